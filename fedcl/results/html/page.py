"""The page, from a run and its figures: the templates, and the environment that escapes whatever comes from a run."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped, unused-ignore]
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from fedcl.base.files import write_atomic, write_bytes_atomic
from fedcl.results import schema
from fedcl.results.caveats import caveats
from fedcl.results.figures import Drawn, draw_all, render
from fedcl.results.figures.timeline import FAULTS
from fedcl.results.html import content
from fedcl.results.html.svg import inline
from fedcl.results.report import event_counts
from fedcl.results.run import Run
from fedcl.unlearning import verification

_MAX_CERTIFICATES = 500
_UNSEEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def write(run: Run, *, defaults: Mapping[str, Any] | None = None, kinds: Sequence[str] = ()) -> Path:
    """Draw a run's figures into its ``figures/``, write its ``report.html`` and return where that is.

    Parameters
    ----------
    run
        The run, finished or not.
    defaults
        The default configuration, to show what this run changed; None if it is not known.
    kinds
        File types of each figure besides SVG: ``png``, ``pdf``.

    Raises
    ------
    OSError
        If the folder cannot be written.
    """
    folder = run.path / schema.FIGURES
    folder.mkdir(exist_ok=True)
    drawn, absent = draw_all(run)
    files = {}
    for one in drawn:
        for kind in ("svg", *kinds):
            data = render(one.figure, kind)
            write_bytes_atomic(folder / f"{one.entry.name}.{kind}", data)
            if kind == "svg":
                files[one.entry.name] = data.decode()
    path = run.path / schema.REPORT
    page = environment().get_template("report.html")
    write_atomic(path, page.render(_content(run, defaults), figures=list(_figures(drawn, files)), absent=absent))
    return path


def environment() -> Environment:
    """Return the environment of the templates.

    Every value is escaped, in attributes too. Control characters, and those that change the direction of text, are
    shown as the replacement character.
    """
    return Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        finalize=_visible,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )


def _visible(value: object) -> str:
    return value if isinstance(value, Markup) else _UNSEEN.sub("\N{REPLACEMENT CHARACTER}", str(value))


def _content(run: Run, defaults: Mapping[str, Any] | None) -> dict[str, Any]:
    findings = verification.read(run.path)
    counts = event_counts(run)
    return {
        "run": run,
        "name": str(run.config.get("name", "")) or run.path.name,
        "version": (run.env.get("packages") or {}).get("fedcl", ""),
        "num_rounds": int(run.metrics["round"].max()) + 1 if len(run.metrics) else 0,
        "cards": content.cards(run),
        "caveats": caveats(run),
        "numbers": content.numbers(run),
        "tasks": content.tasks(run),
        "clients": content.clients(run),
        "settings": None if defaults is None else content.settings(run, defaults),
        "configuration": yaml.safe_dump(run.config, sort_keys=False, allow_unicode=True),
        "faults": content.faults(run),
        "other_events": {kind: n for kind, n in counts.items() if kind not in FAULTS and kind != "partition"},
        "certificates": [content.certificate_of(finding) for finding in findings[:_MAX_CERTIFICATES]],
        "num_certificates": len(findings),
        "environment": content.environment(run),
        "command": content.command(run),
        "git": run.env.get("git") or {},
    }


def _figures(drawn: Sequence[Drawn], files: Mapping[str, str]) -> Iterator[dict[str, Any]]:
    for one in drawn:
        name, words = one.entry.name, one.figure.get_label()
        yield {"entry": one.entry, "words": words, "svg": inline(files[name], name)}
