"""A run's report on the terminal: its settings, headline numbers, faults, and the folder of its figures."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterator
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from fedcl.results import schema
from fedcl.results.caveats import caveats
from fedcl.results.run import Run
from fedcl.server.selection import client_order

_COMPONENTS = (
    "strategy.collaboration", "strategy.projection", "strategy.staleness", "strategy.optimizer", "learner", "unlearner",
    "scenario", "data", "model", "devices", "backend",
)  # fmt: skip
_SCALARS = ("seed", "num_clients", "clients_per_round", "rounds_per_task", "device", "engine")
_PLAIN = ("staleness/mean", "staleness/max", "clients_per_second")
_RATES = ("accuracy/", "forgetting/", "personal/", "stability/")
_WINDOWED = re.compile(r"(reference/)?stability/\w+/\w+_\d+")
_MAX_TASKS = 12
_MAX_CLIENTS = 20


def terminal_report(run: Run, *, width: int = 100, color: bool = False) -> str:
    """Return the report of a run as text.

    Parameters
    ----------
    run
        The run, finished or not.
    width
        Columns of the terminal.
    color
        Whether to use ANSI colours; False where the output is not a terminal.
    """
    out = io.StringIO()
    console = Console(file=out, width=width, force_terminal=color, no_color=not color, highlight=False)
    console.print(Group(*_sections(run)))
    # tables are padded to their full width, which shows in files and diffs
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines()) + "\n"


def headline_rows(run: Run) -> list[tuple[str, str, str, str]]:
    """Return (key, value, reference's value, difference) as text, in the order of the schema; empty if unknown.

    Windowed forgetting and plasticity are left to ``summary.json``: too many numbers to read at a glance.
    The reference's values come from the reference run, or without one from the ``reference/`` keys of the summary.
    """
    own = run.headline()
    beside = run.reference.headline() if run.reference else {}
    rows = []
    for key in (*schema.SUMMARY_KEYS, *sorted(key for key in own if key not in schema.SUMMARY_KEYS)):
        if _WINDOWED.fullmatch(key) or (key.startswith("reference/") and key.removeprefix("reference/") in own):
            continue
        value, reference = own.get(key), beside.get(key, own.get(f"reference/{key}"))
        if value is None and reference is None:
            continue
        rows.append((key, _show(key, value), _show(key, reference), _difference(key, value, reference)))
    return rows


def event_counts(run: Run) -> dict[str, int]:
    """Return how often each kind of event happened, most frequent first, then by name."""
    counts = run.events["kind"].value_counts()
    return {str(kind): int(counts[kind]) for kind in sorted(counts.index, key=lambda kind: (-counts[kind], kind))}


def _sections(run: Run) -> Iterator[RenderableType]:
    yield Text(f"{run.path}  ({run.status})", style="bold")
    yield from _what_was_run(run)
    rows = headline_rows(run)
    yield Text("")
    if rows:
        yield _headline(rows, complete=bool(run.summary))
    else:
        yield Text("no accuracy has been measured yet")
    for text in caveats(run):
        yield Text("")
        yield Text(f"note: {text}")
    if not run.accuracy_matrix().empty:
        yield Text("")
        yield _accuracies(run)
    clients = _clients(run)
    if clients is not None:
        yield Text("")
        yield clients
    ages = run.staleness()
    if len(ages) > 1:
        yield Text("")
        yield Text("updates by age: " + ", ".join(f"{age}: {count}" for age, count in ages.items()))
    yield Text("")
    counts = event_counts(run)
    yield Text("events: " + (", ".join(f"{kind} {count}" for kind, count in counts.items()) or "none"))
    names = sorted({file.stem for kind in ("svg", "png") for file in (run.path / schema.FIGURES).glob(f"*.{kind}")})
    yield Text(f"figures: {run.path / schema.FIGURES} ({', '.join(names)})" if names else "figures: none drawn")


def _what_was_run(run: Run) -> Iterator[RenderableType]:
    scalars = [f"{key}={_told(key, run.config[key])}" for key in _SCALARS if key in run.config]
    if scalars:
        yield Text("  ".join(scalars))
    parts = [(name, _target(run.config, name)) for name in _COMPONENTS]
    named = [f"{name.rpartition('.')[2]}={target}" for name, target in parts if target]
    if named:
        yield Text("  ".join(named))
    yield Text("changed: " + ("  ".join(run.overrides) or "nothing"))
    if "cpu" in run.env:
        yield Text(f"on: {run.env['cpu']}" + (f", {run.env['gpu']}" if run.env.get("gpu") else ""))


def _told(key: str, value: Any) -> Any:
    return "all" if key == "clients_per_round" and value is None else value


def _target(config: dict[str, Any], name: str) -> str:
    node: Any = config
    for part in name.split("."):
        node = node.get(part) if isinstance(node, dict) else None
    return str(node.get("_target_", "")).rpartition(".")[2] if isinstance(node, dict) else ""


def _headline(rows: list[tuple[str, str, str, str]], *, complete: bool) -> Table:
    table = Table(title="results" if complete else "results so far", title_justify="left", title_style="bold")
    compared = any(reference for _, _, reference, _ in rows)
    table.add_column("")
    for name in ("this run", "reference", "difference") if compared else ("this run",):
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(*(row if compared else row[:2]))
    return table


def _accuracies(run: Run) -> RenderableType:
    matrix = run.accuracy_matrix()
    if len(matrix) > _MAX_TASKS:
        return Text(f"accuracy of {len(matrix)} tasks: see figures/accuracy_matrix.png, or Run.accuracy_matrix()")
    table = Table(title="test accuracy (%)", title_justify="left", title_style="bold")
    table.add_column("after task", justify="right")
    for task in matrix.columns:
        table.add_column(f"on {task}", justify="right")
    for after, values in zip(matrix.index, matrix.to_numpy(), strict=True):
        cells = ("" if math.isnan(value) else f"{100 * value:.1f}" for value in values)
        table.add_row(str(after), *cells)
    return table


def _clients(run: Run) -> RenderableType | None:
    """Return each client's accuracy by phase, on its own test samples; None if clients were not tested."""
    phases = {phase: run.by_client(phase) for phase in ("received", "trained", "personal")}
    phases = {phase: values for phase, values in phases.items() if values}
    clients = sorted({client for values in phases.values() for client in values}, key=client_order)
    if not clients:
        return None
    if len(clients) > _MAX_CLIENTS:
        return Text(f"accuracy of {len(clients)} clients: see Run.by_client(phase)")
    table = Table(title="accuracy of each client (%)", title_justify="left", title_style="bold")
    for column in ("client", *phases):
        table.add_column(column, justify="right")
    for client in clients:
        cells = (f"{100 * values[client]:.1f}" if client in values else "" for values in phases.values())
        table.add_row(client, *cells)
    return table


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _difference(key: str, value: Any, reference: Any) -> str:
    if not (_is_number(value) and _is_number(reference)):
        return ""
    # the difference of two percentages is in percentage points
    return _show(key, value - reference, signed=True).replace(" %", " pp")


def _show(key: str, value: Any, *, signed: bool = False) -> str:
    """Return a value with its unit: rates as percent, traffic as bytes, times as seconds, the rest as it is."""
    if value is None:
        return ""
    if not _is_number(value):
        return str(value)
    if math.isnan(value):
        return "-"
    sign = "+" if signed else ""
    if key.startswith("bytes/") or key == "cost/state_bytes":
        return _bytes(value, sign)
    if key in ("virtual_time", "wall_time"):
        return f"{value:{sign}.1f} s"
    if key.startswith(_RATES) or key in ("bwt", "fwt", "intransigence"):
        return f"{100 * value:{sign}.2f} %"
    if key in _PLAIN:
        return f"{value:{sign}.2f}"
    return f"{value:{sign}.4g}" if isinstance(value, float) else f"{value:{sign}d}"


def _bytes(value: float, sign: str) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if abs(value) >= size:
            return f"{value / size:{sign}.2f} {unit}"
    return f"{value:{sign}.0f} B"
