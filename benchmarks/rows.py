"""Rows times seeds in one table or several: what the smaller benchmarks share.

A benchmark is a :class:`Bench` of tables; a row is what it changes in ``experiment=<name of the benchmark>``. All is
played in one process, inline. Finished runs are kept under ``--work`` and not repeated; ``results.json`` and the tables
of the README are made from what is kept there.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.every_learner import Numbers, Row, rewrite, spread
from fedcl.config.compose import compose
from fedcl.runs import experiment

Kept = dict[str, dict[str, Any]]  # row -> {"settings", "runs": {seed: numbers}}


def nothing(folder: Path) -> Numbers:
    """Return no numbers beside the summary's."""
    return {}


@dataclass(frozen=True)
class Column:
    """A column: what is above it, a key of ``summary.json`` or of ``Bench.measure``, and what it is multiplied by."""

    title: str
    key: str
    scale: float = 100.0
    digits: int = 1


@dataclass(frozen=True)
class Table:
    """A table: the overrides of all its runs, its rows, the first of which is the baseline, and its columns."""

    name: str
    title: str
    overrides: tuple[str, ...]
    rows: tuple[Row, ...]
    columns: tuple[Column, ...]


@dataclass(frozen=True)
class Bench:
    """One benchmark.

    ``measure`` returns numbers of a finished run's folder beside its summary; ``prepare`` returns, for a seed and the
    folder of the work, overrides of all runs of that seed that name files which it has made there.
    """

    name: str
    folder: Path
    tables: tuple[Table, ...]
    measure: Callable[[Path], Numbers] = nothing
    prepare: Callable[[int, Path], tuple[str, ...]] = lambda seed, work: ()


def run_row(overrides: Sequence[str], folder: Path) -> dict[str, Any]:
    """Play one run into ``folder``, from the beginning, and return its summary."""
    shutil.rmtree(folder, ignore_errors=True)  # of a run that did not finish
    settings = [*overrides, f"run_dir={json.dumps(str(folder))}"]
    experiment.run(compose(settings), settings, (), quiet=True)
    summary: dict[str, Any] = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    return summary


def numbers(bench: Bench, table: Table, row: Row, seed: int, work: Path) -> Numbers:
    """Play one row with one seed and return all its finite numbers."""
    folder = work / table.name / f"{row.name}-{seed}"
    made = bench.prepare(seed, work)
    chosen = [f"experiment={bench.name}", *table.overrides, *row.overrides, *made, f"seed={seed}"]
    summary = run_row(chosen, folder) | bench.measure(folder)
    shutil.rmtree(folder)
    return {key: float(value) for key, value in summary.items() if _finite(value)}


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def measure(bench: Bench, table: Table, rows: Sequence[Row], seeds: Sequence[int], work: Path) -> None:
    """Play what is still to be played of one table."""
    for row in rows:
        for seed in seeds:
            file = work / table.name / f"{row.name}-{seed}.json"
            settings = [*table.overrides, *row.overrides]
            if file.is_file() and json.loads(file.read_text(encoding="utf-8"))["settings"] == settings:
                continue
            found = numbers(bench, table, row, seed, work)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps({"settings": settings, "numbers": found}) + "\n", encoding="utf-8")
            shown = {column.title: round(found.get(column.key, math.nan), 4) for column in table.columns}
            print(table.name, row.name, seed, shown, flush=True)


def kept(table: Table, seeds: Sequence[int], work: Path) -> Kept:
    """Return the numbers of a table's columns, of all runs that have been played as they are set now."""
    result: Kept = {}
    for row in table.rows:
        settings = [*table.overrides, *row.overrides]
        for seed in seeds:
            file = work / table.name / f"{row.name}-{seed}.json"
            found = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {"settings": None}
            if found["settings"] == settings:
                chosen = {c.key: round(found["numbers"][c.key], 6) for c in table.columns if c.key in found["numbers"]}
                entry = result.setdefault(row.name, {"settings": settings, "runs": {}})
                entry["runs"][str(seed)] = chosen
    return result


def text(table: Table, found: Kept) -> str:
    """Return a table in Markdown; the last column is the first one's difference to the baseline, seed by seed."""
    first, baseline = table.columns[0], table.rows[0].name
    head = ["", *(column.title for column in table.columns), f"{first.title}, against {baseline}"]
    lines = [f"### {table.title}", "", "| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for name, entry in found.items():
        runs: Mapping[str, Numbers] = entry["runs"]
        cells = []
        for column in table.columns:
            values = [one[column.key] * column.scale for one in runs.values() if column.key in one]
            cells.append(spread(values, column.digits) if values else "-")
        base: Mapping[str, Numbers] = found.get(baseline, {"runs": {}})["runs"]
        shared = [seed for seed in runs if first.key in runs[seed] and first.key in base.get(seed, {})]
        differences = [(runs[seed][first.key] - base[seed][first.key]) * first.scale for seed in shared]
        cells.append(_signed(differences, first.digits) if differences and name != baseline else "")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _signed(values: Sequence[float], digits: int) -> str:
    return ("+" if mean(values) > 0 else "") + spread(values, digits)


def main(bench: Bench, description: str | None) -> dict[str, Kept]:
    """Read the command line, play, write results.json and the tables; return all numbers by table and row."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="ROW", help="rows to play")
    parser.add_argument("--tables", nargs="+", choices=[table.name for table in bench.tables])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--work", type=Path, default=Path("runs") / bench.name, help="where runs are kept")
    parser.add_argument("--dry", action="store_true", help="print the tables and leave the files as they are")
    args = parser.parse_args()
    work = args.work.resolve()
    known = {row.name for table in bench.tables for row in table.rows}
    if unknown := sorted(set(args.only or ()) - known):
        parser.error(f"--only {' '.join(unknown)}: not among {', '.join(sorted(known))}")
    for table in bench.tables:
        if not args.tables or table.name in args.tables:
            rows = [row for row in table.rows if not args.only or row.name in args.only]
            measure(bench, table, rows, args.seeds, work)
    results = {table.name: kept(table, args.seeds, work) for table in bench.tables}
    body = "\n\n".join(text(table, results[table.name]) for table in bench.tables if results[table.name])
    print(body)
    if not args.dry:
        (bench.folder / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        rewrite(bench.folder / "README.md", "tables", body)
    return results
