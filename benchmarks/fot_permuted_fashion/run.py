"""FOT on permuted Fashion-MNIST against the published code's numbers: runs the rows, writes results.json and the table.

    FEDCL_DATA=... python benchmarks/fot_permuted_fashion/run.py --jobs 2

Finished runs are kept under --runs and not repeated. Exit status 1 if a row is off its reference.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
LAYERS = ("hidden.0", "hidden.1", "hidden.2", "head")
SERVER = "strategy.projection.server"


@dataclass(frozen=True)
class Row:
    """One line of the table: overrides of the experiment, and what to hold the result against, in percent."""

    name: str
    title: str
    overrides: tuple[str, ...]
    reference: dict[str, float] | None = None
    ranks: tuple[tuple[int, ...], ...] = ()


# The published aggregator, trainer and loader classes, run on the same data with the same settings, seed 0.
ROWS = (
    Row("fedavg", "FedAvg", ("strategy/projection=none",), {"accuracy": 76.29, "forgetting": 3.89}),
    Row(
        "official",
        "FOT, official, eps .96",
        (f"{SERVER}.variant=official", f"{SERVER}.epsilon=0.96"),
        {"accuracy": 78.16, "forgetting": 0.12},
        ((103, 64, 80, 113), (213, 128, 179, 240), (306, 184, 253, 315), (386, 230, 304, 354)),
    ),
    Row("corrected", "FOT, corrected, eps .96", (f"{SERVER}.variant=corrected", f"{SERVER}.epsilon=0.96")),
    Row("corrected-90", "FOT, corrected, eps .90", (f"{SERVER}.variant=corrected", f"{SERVER}.epsilon=0.9")),
)
TOLERANCE = {"accuracy": 1.5, "forgetting": 1.0, "ranks": 0.10}


def play(row: Row, seed: int, runs: Path) -> Path:
    """Run one row with one seed unless that has been done; return its folder."""
    folder = runs / f"{row.name}-{seed}"
    status = folder / "STATUS"
    if not (status.is_file() and status.read_text().strip() == "done"):
        settings = [f"seed={seed}", f"run_dir={folder}", "checkpoint.every=0", *row.overrides]
        subprocess.run(
            [sys.executable, "-m", "fedcl", "run", "experiment=fot_permuted_fashion", *settings, "--quiet"],
            check=True,
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
    return folder


def measure(folder: Path) -> dict[str, Any]:
    """Return a run's numbers: rates in percent, ranks by task and layer."""
    summary = json.loads((folder / "summary.json").read_text())
    table = pd.read_parquet(folder / "metrics.parquet")
    accuracy = table[(table["phase"] == "test") & (table["name"] == "accuracy") & (table["round"] >= 0)]
    matrix = accuracy.pivot_table(index="after", columns="task", values="value", aggfunc="last").to_numpy() * 100
    server = table[table["phase"] == "server"]
    ranks = []
    for after in range(len(matrix) - 1):
        ended = server[server["after"] == after].groupby("name")["value"].last()
        names = [f"projection/rank/{layer}" for layer in LAYERS]
        ranks.append([int(ended[name]) for name in names] if names[0] in ended else [])
    return {
        "accuracy": 100 * summary["accuracy/average"],
        "forgetting": 100 * summary["forgetting/first"],
        "learning": float(np.mean(np.diag(matrix))),
        "last_row": [round(float(value), 2) for value in matrix[-1]],
        "ranks": [rank for rank in ranks if rank],
        "megabytes": (summary["bytes/up"] + summary["bytes/down"]) / 1e6,
        "seconds": summary["wall_time"],
    }


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean and the half-width of its 95 % t interval."""
    mean, count = float(np.mean(values)), len(values)
    if count < 2:
        return mean, float("nan")
    return mean, float(stats.t.ppf(0.975, count - 1) * np.std(values, ddof=1) / count**0.5)


def deviations(row: Row, measured: Sequence[dict[str, Any]]) -> list[str]:
    """Return in words what is farther from the reference than TOLERANCE allows."""
    wrong = []
    for name, expected in (row.reference or {}).items():
        mean = float(np.mean([one[name] for one in measured]))
        if abs(mean - expected) > TOLERANCE[name]:
            wrong.append(f"{row.name}: {name} {mean:.2f}, reference {expected}")
    for task, expected_ranks in enumerate(row.ranks):
        mean_ranks = np.mean([one["ranks"][task] for one in measured], axis=0)
        for layer, mean, reference in zip(LAYERS, mean_ranks, expected_ranks, strict=True):
            if abs(mean - reference) > TOLERANCE["ranks"] * reference:
                wrong.append(f"{row.name}: rank of {layer} after task {task} is {mean:.1f}, reference {reference}")
    return wrong


def table(results: dict[str, Any]) -> str:
    """Return the results as a Markdown table."""
    lines = [
        "| | accuracy (%) | forgetting, first (%) | just learned (%) | ranks after task 4 | reference: acc / forg. |",
        "|---|---|---|---|---|---|",
    ]
    for row in ROWS:
        if row.name not in results:
            continue
        runs = results[row.name]["runs"].values()
        cells = ["{:.2f} ± {:.2f}".format(*interval([one[key] for one in runs]))
                 for key in ("accuracy", "forgetting", "learning")]  # fmt: skip
        ranks = [one["ranks"][-1] for one in runs if one["ranks"]]
        shown = ", ".join(f"{value:.0f}" for value in np.mean(ranks, axis=0)) if ranks else "-"
        reference = "{accuracy} / {forgetting}".format(**row.reference) if row.reference else "-"
        lines.append(f"| {row.title} | {' | '.join(cells)} | {shown} | {reference} |")
    return "\n".join(lines)


def main() -> int:
    """Play, measure, write; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rows", nargs="+", choices=[row.name for row in ROWS], default=[row.name for row in ROWS])
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "fot_permuted_fashion")
    args = parser.parse_args()
    chosen = [row for row in ROWS if row.name in args.rows]
    pairs = [(row, seed) for seed in args.seeds for row in chosen]
    with ThreadPoolExecutor(args.jobs) as pool:
        folders = list(pool.map(lambda pair: play(*pair, args.runs.resolve()), pairs))
    results: dict[str, Any] = {}
    for (row, seed), folder in zip(pairs, folders, strict=True):
        results.setdefault(row.name, {"overrides": row.overrides, "runs": {}})["runs"][str(seed)] = measure(folder)
    (HERE / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    readme = HERE / "README.md"
    before, _, rest = readme.read_text(encoding="utf-8").partition("<!-- table -->")
    after = rest.partition("<!-- /table -->")[2]
    text = table(results)
    readme.write_text(f"{before}<!-- table -->\n{text}\n<!-- /table -->{after}", encoding="utf-8")
    print(text)
    wrong = [line for row in chosen for line in deviations(row, list(results[row.name]["runs"].values()))]
    print("\n".join(wrong) or "every reference is met")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
