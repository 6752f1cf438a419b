"""The parts of the page that tell what came out, in numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from fedcl.results.caveats import caveats
from fedcl.results.html import elements as e
from fedcl.results.html.elements import Cell
from fedcl.results.html.sections import class_names, faults_by_client
from fedcl.results.report import headline_rows
from fedcl.results.run import Run
from fedcl.server.selection import client_order

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
_IDLE = ("staleness/mean", "virtual_time")  # no card where nothing could be late and devices took no time
_PHASES = {"received": "received (%)", "trained": "after training (%)", "personal": "would use (%)"}
_MAX_CLIENTS = 1000


def headline(run: Run) -> str:
    """Return the few numbers to begin with, and all of them with the reference's and the difference."""
    shown = headline_rows(run)
    if not shown:
        return e.section("results", "Results", e.paragraph("No accuracy has been measured yet."))
    by_key = {row[0]: row for row in shown}
    compared = any(reference for _, _, reference, _ in shown)
    columns = ("number", "this run", "reference", "difference") if compared else ("number", "this run")
    values = run.headline()
    beside = run.reference.headline() if run.reference is not None else {}
    idle = [key for key in _IDLE if not (values.get(key) or beside.get(key))]
    carded = [key for key in _CARDS if key in by_key and by_key[key][1] and key not in idle]
    cards = "".join(_card(_CARDS[key], by_key[key]) for key in carded)
    rows = []
    for key, own, reference, difference in shown:
        value, other = _number(values.get(key)), _number(beside.get(key, values.get(f"reference/{key}")))
        gap = None if value is None or other is None else value - other
        row = [Cell(key), Cell(own, value), Cell(reference, other), Cell(difference, gap)]
        rows.append(row[: len(columns)])
    table = e.table("All numbers of summary.json" if run.summary else "Numbers so far", columns, rows)
    note = e.paragraph("docs/metrics.md tells what each number is.")
    told = [f'<p class="note">{e.esc(text)}</p>' for text in caveats(run)]
    return e.section(
        "results", "Results", f'<ul class="cards">{cards}</ul>', *told, e.details("All numbers", table + note)
    )


def tables(run: Run) -> str:
    """Return a table of the tasks and one of the clients."""
    parts = [part for part in (_tasks(run), _clients(run)) if part]
    return e.section("tables", "Tasks and clients", *(parts or [e.paragraph("Nothing was tested or trained yet.")]))


def _card(name: str, row: tuple[str, str, str, str]) -> str:
    _, own, reference, difference = row
    beside = f"<span>reference {e.esc(reference)} ({e.esc(difference)})</span>" if reference else ""
    return f"<li><span>{e.esc(name)}</span><strong>{e.esc(own)}</strong>{beside}</li>"


def _tasks(run: Run) -> str:
    matrix = run.accuracy_matrix()
    if matrix.empty:
        return ""
    reached = len(run.reached_matrix())
    classes = class_names(run)
    other = run.reference.accuracy_matrix() if run.reference is not None else None
    lost = run.forgetting()
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
    return e.table("Test accuracy of the global model by task", columns, rows)


def _clients(run: Run) -> str:
    trained = run.metrics[run.metrics["phase"] == "train"]
    wide = trained.pivot_table(index="client", columns="name", values="value", aggfunc=["count", "last", "mean"])
    phases = {name: run.by_client(phase) for phase, name in _PHASES.items()}
    phases = {name: values for name, values in phases.items() if values}
    clients = sorted({*map(str, wide.index), *(c for values in phases.values() for c in values)}, key=client_order)
    if not clients:
        return ""
    aged, faults = ("mean", "age") in wide.columns, faults_by_client(run)
    rows = []
    for client in clients[:_MAX_CLIENTS]:
        known: Mapping[Any, Any] = wide.loc[client].to_dict() if client in wide.index else {}
        row = [Cell(client), _plain(known.get(("count", "num_examples"))), _plain(known.get(("last", "num_examples")))]
        row += [_plain(known.get(("mean", "age")), digits=2)] if aged else []
        row += [_percent(values.get(client, math.nan)) for values in phases.values()]
        rows.append([*row, Cell(str(faults[client]), float(faults[client]))])
    columns = ["client", "updates", "samples, last task", *(["mean age"] if aged else []), *phases, "faults"]
    more = e.paragraph(f"These are the first {_MAX_CLIENTS} of {len(clients)}.") if len(clients) > _MAX_CLIENTS else ""
    return e.table("Clients, accuracy on their own test samples", columns, rows) + more


def _percent(value: object) -> Cell:
    number = _number(value)
    return Cell("") if number is None else Cell(f"{100 * number:.1f}", number)


def _plain(value: object, digits: int = 0) -> Cell:
    number = _number(value)
    return Cell("") if number is None else Cell(f"{number:.{digits}f}", number)


def _number(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)
