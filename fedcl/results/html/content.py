"""What the page says, from a run's tables: its numbers, settings, faults, certificates and environment."""

from __future__ import annotations

import json
import math
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedcl.results.configurations import leaves
from fedcl.results.figures.timeline import FAULTS
from fedcl.results.report import headline_rows
from fedcl.results.run import Run
from fedcl.server.selection import client_order
from fedcl.unlearning.verification import Finding

_CARDS = {
    "accuracy/average": "average accuracy",
    "forgetting/chaudhry": "forgetting (Chaudhry)",
    "personal/accuracy_mean": "clients' own accuracy, mean",
    "personal/accuracy_worst10": "clients' own accuracy, worst tenth",
    "staleness/mean": "mean age of updates",
    "unlearning/gap/average": "gap to retraining",
    "bytes/up": "sent by clients",
    "virtual_time": "virtual time",
    "wall_time": "wall time",
    "rounds": "rounds",
}
_IDLE = ("staleness/mean", "virtual_time")  # no card if nothing could be late and devices took no time
_PHASES = {"received": "received (%)", "trained": "after training (%)", "personal": "would use (%)"}
_LOCAL = ("run_dir", "name", "trusted_packages")  # depend on this machine, not on the experiment
_MAX_CLIENTS, _MAX_FAULTS = 1000, 500


@dataclass(frozen=True)
class Cell:
    """A table's cell: its text, and the number that it is sorted by if it shows one."""

    text: str
    value: float | None = None


class Table:
    """A table that can be sorted by any column; ``total`` counts its rows and those that were left out."""

    def __init__(
        self, caption: str, columns: Sequence[str], rows: Sequence[Sequence[Cell | str]], total: int | None = None
    ) -> None:
        self.caption, self.columns = caption, columns
        self.rows = [[Cell(cell) if isinstance(cell, str) else cell for cell in row] for row in rows]
        self.total = len(rows) if total is None else total

    def is_number(self, column: int) -> bool:
        """Whether any cell of a column shows a number."""
        return any(row[column].value is not None for row in self.rows)


def numbers(run: Run) -> Table:
    """Return all numbers of the summary, with the reference's and the difference if there is one."""
    shown, values, beside = headline_rows(run), run.headline(), _reference_headline(run)
    columns = ["number", "this run", "reference", "difference"]
    columns = columns if any(reference for _, _, reference, _ in shown) else columns[:2]
    rows = []
    for key, own, reference, difference in shown:
        value, other = _number(values.get(key)), _number(beside.get(key, values.get(f"reference/{key}")))
        gap = None if value is None or other is None else value - other
        rows.append([Cell(key), Cell(own, value), Cell(reference, other), Cell(difference, gap)][: len(columns)])
    return Table("All numbers of summary.json" if run.summary else "Numbers so far", columns, rows)


def cards(run: Run) -> list[dict[str, str]]:
    """Return the few numbers to begin with."""
    values, beside = run.headline(), _reference_headline(run)
    shown = {key: row for key, *row in headline_rows(run) if row[0]}
    idle = [key for key in _IDLE if not (values.get(key) or beside.get(key))]
    fields = ("value", "reference", "difference")
    return [
        {"name": name, **dict(zip(fields, shown[key], strict=True))}
        for key, name in _CARDS.items()
        if key in shown and key not in idle
    ]


def tasks(run: Run) -> Table:
    """Return the global model's accuracy on each task, when it was learned and now."""
    matrix = run.accuracy_matrix()
    reached = len(run.reached_matrix())
    classes, lost = _class_names(run), run.forgetting()
    other = run.reference.accuracy_matrix() if run.reference is not None else None
    rows = []
    for task in matrix.index:
        learned, now = matrix.loc[task, task], matrix.loc[max(reached - 1, 0), task]
        row = [Cell(str(task), float(task)), Cell(classes.get(int(task), "")), _percent(learned), _percent(now)]
        row.append(_percent(lost.get(task, math.nan)))
        if other is not None:
            row.append(_percent(other.iloc[-1].get(task, math.nan) if len(other) else math.nan))
        rows.append(row)
    columns = ["task", "classes", "when learned (%)", "now (%)", "forgotten (pp)"]
    columns += ["reference, now (%)"] if other is not None else []
    return Table("Test accuracy of the global model by task", columns, rows)


def clients(run: Run) -> Table:
    """Return each client's updates, samples, accuracy on its own test samples, and faults."""
    trained = run.metrics[run.metrics["phase"] == "train"]
    wide = trained.pivot_table(index="client", columns="name", values="value", aggfunc=["count", "last", "mean"])
    phases = {name: values for phase, name in _PHASES.items() if (values := run.by_client(phase))}
    names = sorted({*map(str, wide.index), *(c for values in phases.values() for c in values)}, key=client_order)
    aged, faulty = ("mean", "age") in wide.columns, _faults_by_client(run)
    rows = []
    for client in names[:_MAX_CLIENTS]:
        known: Mapping[Any, Any] = wide.loc[client].to_dict() if client in wide.index else {}
        row = [Cell(client), *(_plain_cell(known.get((what, "num_examples"))) for what in ("count", "last"))]
        row += [_plain_cell(known.get(("mean", "age")), digits=2)] if aged else []
        row += [_percent(values.get(client, math.nan)) for values in phases.values()]
        rows.append([*row, Cell(str(faulty[client]), float(faulty[client]))])
    columns = ["client", "updates", "samples, last task", *(["mean age"] if aged else []), *phases, "faults"]
    return Table("Clients, accuracy on their own test samples", columns, rows, total=len(names))


def settings(run: Run, defaults: Mapping[str, Any]) -> Table:
    """Return the settings that differ from the default configuration."""
    own, usual = dict(leaves(run.config)), dict(leaves(defaults))
    names = [key for key in {**own, **usual} if key.split(".")[0] not in _LOCAL]
    empty = {key for key in names if usual.get(key) == {} and any(other.startswith(f"{key}.") for other in own)}
    changed = [key for key in names if own.get(key) != usual.get(key) and key not in empty]
    rows = [(key, _setting(own, key), _setting(usual, key)) for key in changed]
    return Table("Settings that are not the default", ("setting", "this run", "default"), rows)


def faults(run: Run) -> Table:
    """Return lost and rejected replies and skipped rounds."""
    found = run.events[run.events["kind"].isin(FAULTS)]
    rows = []
    for _, event in found.head(_MAX_FAULTS).iterrows():
        fields = {key: value for key, value in event.items() if not (value is None or value != value)}
        at, kind, client = int(fields.pop("round")), str(fields.pop("kind")), str(fields.pop("client", ""))
        fields.pop("virtual_time", None)
        rest = "; ".join(f"{key}: {_plain(value)}" for key, value in fields.items())
        rows.append((kind, Cell(str(at + 1), at), client, rest))
    return Table("Faults and rejected replies", ("event", "round", "client", "details"), rows, total=len(found))


def certificate_of(finding: Finding) -> dict[str, Any]:
    """Return a certificate's name and faults and, if it can be read, what it certifies."""
    content = finding.content
    shown: dict[str, Any] = {"name": finding.name, "faults": finding.faults}
    if not content:
        return shown
    request = content["request"]
    named = {key: request[key] for key in ("clients", "classes", "tasks") if request.get(key)}
    if request.get("samples"):
        named["samples"] = f"{len(request['samples'])}, as digests"
    rows = [
        (
            "forget set",
            f"{request.get('scope')}: " + "; ".join(f"{key} {_plain(value)}" for key, value in named.items()),
        ),
        ("before round", int(content["server_round"]) + 1),
        ("unlearner", str(content["unlearner"].get("name", "")).rpartition(".")[2]),
        ("guarantee", content["guarantee"]),
        ("processed with", ", ".join(map(str, content["processed_with"])) or "no other"),
        ("cost", "; ".join(f"{key} {_plain(value)}" for key, value in content["cost"].items())),
        ("written", content["time"]),
        ("SHA-256", content["sha256"]),
    ]
    outcomes = [tuple(str(one.get(key, "")) for key in ("part", "outcome", "why")) for one in content["erasure"]]
    caption = f"Erasure outcome of each part that keeps state: {request.get('id')}"
    return {**shown, "rows": rows, "outcomes": Table(caption, ("part", "outcome", "why"), outcomes)}


def environment(run: Run) -> list[tuple[str, str]]:
    """Return where and with what the run ran, as names and values."""
    rows = [
        (key, _plain(value)) for key, value in run.env.items() if key not in ("launch", "packages", "threads", "git")
    ]
    threads, git = run.env.get("threads") or {}, run.env.get("git")
    rows += [(f"threads, {key}", "not set" if value is None else _plain(value)) for key, value in threads.items()]
    if run.env:
        changed = ", changed" if git and git.get("dirty") else ""
        rows.append(("commit", f"{git['sha']}{changed}" if git else "not a git checkout"))
    return rows + [(key, str(value)) for key, value in (run.env.get("packages") or {}).items()]


def command(run: Run) -> str:
    """Return the command that runs the same experiment again, in a new folder."""
    launch = run.env.get("launch", {})
    chosen = [text for text in launch.get("overrides", run.overrides) if text.partition("=")[0] != "run_dir"]
    folders = [part for folder in launch.get("config_dirs", []) for part in ("--config-dir", folder)]
    return shlex.join(["fedcl", "run", *folders, *chosen])


def _reference_headline(run: Run) -> Mapping[str, Any]:
    return run.reference.headline() if run.reference is not None else {}


def _class_names(run: Run) -> dict[int, str]:
    """Return task -> its classes, as recorded when the run began."""
    recorded = run.events[run.events["kind"] == "partition"]
    found = recorded["tasks"].iloc[0] if len(recorded) and "tasks" in recorded else []
    return {task: ", ".join(map(str, labels)) for task, labels in enumerate(found)} if isinstance(found, list) else {}


def _faults_by_client(run: Run) -> Counter[str]:
    found = run.events[run.events["kind"].isin(FAULTS)]
    return Counter(client for client in found.get("client", []) if isinstance(client, str))


def _setting(values: Mapping[str, Any], key: str) -> str:
    if key not in values:
        return "\N{EN DASH}"
    return values[key] if isinstance(values[key], str) else json.dumps(values[key], ensure_ascii=False)


def _percent(value: object) -> Cell:
    number = _number(value)
    return Cell("") if number is None else Cell(f"{100 * number:.1f}", number)


def _plain_cell(value: object, digits: int = 0) -> Cell:
    number = _number(value)
    return Cell("") if number is None else Cell(f"{number:.{digits}f}", number)


def _number(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def _plain(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list | tuple):
        return ", ".join(map(_plain, value))
    return "none" if value is None else str(value)
