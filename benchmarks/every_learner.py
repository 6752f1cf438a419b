"""Every learner that ``fedcl list learner`` knows, under FedAvg and under FOT: what the learners_* benchmarks share.

A benchmark is a :class:`Bench`: parts (a setting and a table each) times rows (a learner each) times seeds.
All of it is played in one process, inline; finished runs are kept under ``--work`` and not repeated.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any

from fedcl.config.compose import compose, list_choices
from fedcl.config.value_rules import ConfigError
from fedcl.results.intervals import half_width
from fedcl.runs import experiment
from fedcl.server.rounds import RoundFailed

Numbers = dict[str, float]
Results = dict[str, Any]  # part -> row -> {"settings", "runs": {seed: numbers}, "stopped": {seed: why}}
KEPT = {  # key here -> key of summary.json
    "accuracy": "accuracy/average", "forgetting": "forgetting/chaudhry", "learning": "accuracy/learning",
    "up": "bytes/up", "down": "bytes/down", "state": "cost/state_bytes",
}  # fmt: skip
BASELINE = "finetune"


@dataclass(frozen=True)
class Row:
    """A line of the tables: overrides that choose a learner, and the parts it is for (none named: all)."""

    name: str
    overrides: tuple[str, ...]
    parts: tuple[str, ...] = ()


@dataclass(frozen=True)
class Part:
    """A table: what is above it, and the overrides of all its runs."""

    name: str
    title: str
    overrides: tuple[str, ...]
    traffic: bool = True  # whether bytes are worth a column


@dataclass(frozen=True)
class Bench:
    """One benchmark; ``budget`` is what every learner with a memory may keep at each client of a part, in samples."""

    name: str
    folder: Path
    parts: tuple[Part, ...]
    budget: dict[str, int]
    extra: tuple[Row, ...] = ()
    tuned: dict[str, tuple[str, ...]] = field(default_factory=dict)


def rows(bench: Bench) -> list[Row]:
    """Return a row for every choice of the group ``learner``, then the benchmark's own."""
    return [Row(name, (f"learner={name}",)) for name, _ in list_choices("learner")] + list(bench.extra)


def settings(bench: Bench, part: Part, row: Row) -> list[str]:
    """Return what a run of ``row`` changes in the experiment, the part's own settings left out."""
    chosen = [*row.overrides, *bench.tuned.get(row.name, ())]
    plugins = compose([f"experiment={bench.name}", *part.overrides, *chosen])["learner"]
    named = {override.partition("=")[0] for override in chosen}
    keys = [f"learner.{name}.budget" for name, plugin in plugins.items() if "budget" in plugin]
    return chosen + [f"{key}={bench.budget[part.name]}" for key in keys if key not in named]


def run_row(bench: Bench, part: Part, changed: Sequence[str], seed: int, run_dir: Path) -> Numbers:
    """Run one row of one part and return its numbers; rates in [0, 1], bytes, CPU seconds.

    Raises
    ------
    ConfigError
        If the choices do not go together.
    RoundFailed
        If the training diverged: no client's reply was finite.
    """
    overrides = [f"experiment={bench.name}", *part.overrides, *changed, f"seed={seed}", f"run_dir={run_dir}"]
    cfg = compose(overrides)
    shutil.rmtree(run_dir, ignore_errors=True)  # of a run that did not finish
    began = time.process_time()
    experiment.run(cfg, overrides, (), quiet=True)
    seconds = time.process_time() - began
    summary = json.loads((run_dir / "summary.json").read_text(encoding="utf-8"))
    numbers = {name: float(summary[key]) for name, key in KEPT.items() if key in summary}
    return numbers | {"cpu_seconds": seconds}


def measure(bench: Bench, chosen: Sequence[Row], parts: Sequence[Part], seeds: Sequence[int], work: Path) -> Results:
    """Play what is still to be played and return all that was asked for."""
    results: Results = {}
    warm = False
    for part in parts:
        for row in (row for row in chosen if not row.parts or part.name in row.parts):
            changed = settings(bench, part, row)
            entry: dict[str, Any] = {"settings": changed, "runs": {}, "stopped": {}}
            for seed in seeds:
                file = work / part.name / f"{row.name}-{seed}.json"
                if not file.is_file():
                    if not warm:  # so that the first row does not pay for the imports
                        with tempfile.TemporaryDirectory() as folder:
                            run_row(bench, part, ["rounds_per_task=1"], seed, Path(folder) / "run")
                        warm = True
                    file.parent.mkdir(parents=True, exist_ok=True)
                    try:
                        found: dict[str, Any] = run_row(bench, part, changed, seed, file.with_suffix(""))
                    except (ConfigError, RoundFailed) as stop:
                        found = {"stopped": f"{type(stop).__name__}: {stop}"}
                    file.write_text(json.dumps({"settings": changed, "found": found}) + "\n", encoding="utf-8")
                    print(part.name, row.name, seed, found, flush=True)
                kept = json.loads(file.read_text(encoding="utf-8"))
                if kept["settings"] != changed:
                    raise SystemExit(f"{file}: was played with {kept['settings']}, not {changed}; remove it")
                stopped = kept["found"].get("stopped")
                entry["runs" if stopped is None else "stopped"][str(seed)] = stopped or kept["found"]
            results.setdefault(part.name, {})[row.name] = entry
    return results


def spread(values: Sequence[float], digits: int = 1) -> str:
    """Return the mean and the half-width of its 95 % t interval; the mean alone where all values are the same."""
    center = f"{mean(values):.{digits}f}"
    if len(values) < 2 or max(values) == min(values):
        return center
    return f"{center} ± {half_width(values):.{digits}f}"


def size(values: Sequence[float], unit: float) -> str:
    """Return the mean of some numbers of bytes in ``unit``; ``-`` for nothing at all."""
    amount = mean(values) / unit if values else 0.0
    return f"{amount:.{max(0, 1 - math.floor(math.log10(amount))) if amount < 100 else 0}f}" if amount else "-"


def table(part: Part, found: Results) -> str:
    """Return a part's rows as a Markdown table, the most accurate first."""
    traffic = ["MB up", "MB down"] if part.traffic else []
    head = ["learner", "accuracy (%)", "forgetting (%)", "just learned (%)", "time", *traffic, "client keeps (kB)"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    played = {name: entry["runs"] for name, entry in found.items() if entry["runs"]}
    reference = played.get(BASELINE, {})
    for name, runs in sorted(played.items(), key=lambda item: -mean(one["accuracy"] for one in item[1].values())):
        cells = [spread([100 * one[key] for one in runs.values()]) for key in ("accuracy", "forgetting", "learning")]
        shared = runs.keys() & reference.keys()
        ratio = [runs[seed]["cpu_seconds"] / reference[seed]["cpu_seconds"] for seed in sorted(shared)]
        cells.append(spread(ratio, 2) if ratio else "")
        for key in ("up", "down") if part.traffic else ():
            cells.append(size([one[key] for one in runs.values()], 1e6))
        cells.append(size([one["state"] for one in runs.values() if "state" in one], 1e3))
        lines.append(f"| {name} | {' | '.join(cells)} |")
    stopped = [
        f"- {name}, seed {seed}: {why}" for name, entry in found.items() for seed, why in entry["stopped"].items()
    ]
    return "\n".join([f"### {part.title}", "", *lines, *([""] if stopped else []), *stopped])


def rewrite(readme: Path, name: str, text: str) -> None:
    """Put ``text`` between the two marks ``name`` of a file."""
    before, opened, rest = readme.read_text(encoding="utf-8").partition(f"<!-- {name} -->\n")
    _, closed, after = rest.partition(f"<!-- /{name} -->")
    if not opened or not closed:
        raise ValueError(f"{readme}: has no place for {name}")
    readme.write_text(f"{before}{opened}{text}\n{closed}{after}", encoding="utf-8")


def main(bench: Bench, description: str) -> Results:
    """Read the command line, play, write results.json and the tables; return everything measured so far."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="ROW", help="rows: names of learners, and the benchmark's own")
    parser.add_argument("--parts", nargs="+", choices=[part.name for part in bench.parts])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--work", type=Path, default=Path("runs") / bench.name, help="where runs are kept")
    parser.add_argument("--dry", action="store_true", help="print the tables and leave the files as they are")
    args = parser.parse_args()
    known = rows(bench)
    unknown = sorted(set(args.only or ()) - {row.name for row in known})
    if unknown:
        parser.error(f"--only {' '.join(unknown)}: not among {', '.join(row.name for row in known)}")
    chosen = [row for row in known if not args.only or row.name in args.only]
    parts = [part for part in bench.parts if not args.parts or part.name in args.parts]
    found = measure(bench, chosen, parts, args.seeds, args.work)
    file = bench.folder / "results.json"
    results: Results = json.loads(file.read_text(encoding="utf-8")) if file.is_file() and not args.dry else {}
    for part_name, entries in found.items():
        for name, entry in entries.items():
            old = results.setdefault(part_name, {}).get(name, {})
            if old.get("settings") == entry["settings"]:
                entry |= {key: old[key] | entry[key] for key in ("runs", "stopped")}
            results[part_name][name] = entry
    text = "\n\n".join(table(part, results[part.name]) for part in bench.parts if part.name in results)
    print(text)
    if not args.dry:
        file.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        rewrite(bench.folder / "README.md", "tables", text)
    sys.stdout.flush()
    return results
