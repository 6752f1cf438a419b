"""The page, from a run and its figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedcl.base.files import write_atomic, write_bytes_atomic
from fedcl.results import schema
from fedcl.results.figures import Drawn, draw_all, render
from fedcl.results.html import elements as e
from fedcl.results.html import numbers, sections
from fedcl.results.html.look import SCRIPT, STYLE
from fedcl.results.html.svg import inline
from fedcl.results.run import Run

_PARTS = {
    "results": "Results",
    "figures": "Figures",
    "tables": "Tasks and clients",
    "what": "What was run",
    "events": "Faults",
    "certificates": "Certificates",
    "environment": "Environment",
    "repeat": "Do it again",
}
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
_TEMPLATE = """\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<title>{title}</title>
<style>
{style}</style>
</head>
<body>
{body}
<script>
{script}</script>
</body>
</html>
"""


def write(run: Run, *, defaults: Mapping[str, Any] | None = None, kinds: Sequence[str] = ()) -> Path:
    """Draw a run's figures into its ``figures/``, write its ``report.html`` and return where that is.

    Parameters
    ----------
    run
        The run, finished or not.
    defaults
        The configuration of a run with nothing chosen, to tell what was; None where it is not known.
    kinds
        Files besides SVG for each figure: ``png``, ``pdf``.

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
    write_atomic(path, html_report(run, drawn, files, absent, defaults=defaults))
    return path


def html_report(
    run: Run,
    drawn: Sequence[Drawn],
    files: Mapping[str, str],
    absent: Mapping[str, str],
    *,
    defaults: Mapping[str, Any] | None = None,
) -> str:
    """Return the page.

    Parameters
    ----------
    run
        The run, finished or not.
    drawn, files, absent
        Its figures, the SVG files of them by name, and by title why there are no others.
    defaults
        See :func:`write`.
    """
    name = str(run.config.get("name", "")) or run.path.name
    links = "".join(f'<li><a href="#{part}">{e.esc(title)}</a></li>' for part, title in _PARTS.items())
    main = _main(run, drawn, files, absent, defaults)
    footer = (
        f"fedcl {(run.env.get('packages') or {}).get('fedcl', '')}. Everything here is from the files beside this one."
    )
    body = f"""\
<a class="skip" href="#main">To the results</a>
<header>
<h1>{e.esc(name)}</h1>
{_standing(run)}
</header>
<nav aria-label="Parts of this page"><ul>{links}</ul></nav>
<main id="main" tabindex="-1">
{main}
</main>
<footer>{e.paragraph(footer)}</footer>"""
    return _TEMPLATE.format(
        title=e.esc(f"{name}: {run.path.name}"), body=body, style=STYLE, script=SCRIPT, policy=_POLICY
    )


def _main(
    run: Run,
    drawn: Sequence[Drawn],
    files: Mapping[str, str],
    absent: Mapping[str, str],
    defaults: Mapping[str, Any] | None,
) -> str:
    parts = [
        numbers.headline(run),
        _figures(drawn, files, absent),
        numbers.tables(run),
        sections.what_was_run(run, defaults),
        sections.events(run),
        sections.certificates(run),
        sections.environment(run),
        sections.repeat(run),
    ]
    return "\n".join(parts)


def _standing(run: Run) -> str:
    """Return where the run lies and whether it is over."""
    done = run.status == "done"
    rounds = int(run.metrics["round"].max()) + 1 if len(run.metrics) else 0
    told = f'<p><span class="status {"done" if done else "open"}">{e.esc(run.status)}</span> '
    told += f"{rounds} rounds, seed {e.esc(run.config.get('seed', '?'))}, in {e.esc(run.path)}</p>"
    if done:
        return told
    return told + (
        '\n<p class="note">This run is not finished: everything here is as far as it has come. '
        "fedcl resume goes on with it; fedcl report then writes this page again.</p>"
    )


def _figures(drawn: Sequence[Drawn], files: Mapping[str, str], absent: Mapping[str, str]) -> str:
    parts = []
    for one in drawn:
        entry = one.entry
        picture = inline(files[entry.name], entry.name, f"{entry.title}. {one.figure.get_label()}")
        parts.append(
            f'<h3 id="{entry.name}">{e.esc(entry.title)}</h3>\n<figure aria-labelledby="{entry.name}">\n'
            f'<div class="scroll" role="region" tabindex="0" aria-label="{e.esc(entry.title)}, picture">'
            f"{picture}</div>\n"
            f"<figcaption>{e.esc(entry.caption)}</figcaption>\n</figure>"
        )
    if absent:
        reasons = e.bullets(f"{title}: {why}" for title, why in absent.items())
        parts.append(e.details(f"{len(absent)} figures are not drawn, for want of data", reasons))
    return e.section("figures", "Figures", *(parts or [e.paragraph("There is nothing to draw yet.")]))
