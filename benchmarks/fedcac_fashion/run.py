"""FedCAC on Fashion-MNIST against the published code's numbers: runs the rows, writes results.json and the tables.

Each row is played on the published code's clients of seeds 0 and 1 and on clients that fedcl draws, seeds 0 to 2.

    FEDCL_DATA=... python benchmarks/fedcac_fashion/run.py

Finished runs are kept under --runs and not repeated. Exit status 1 if a mark is missed.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from fedcl.config.compose import compose
from fedcl.runs.experiment import run

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
GROUP = "strategy/collaboration"
BETA = "strategy.collaboration.server.beta"
CONFIGS = [HERE / "configs"]
DRAWS = {"published": ("data/partition=as_published",), "fedcl": ()}
SEEDS = {"published": (0, 1), "fedcl": (0, 1, 2)}
QUICK = ("checkpoint.every=0", "figures=false")  # nothing that the numbers do not need
PHASES = ("personal", "trained")  # after aggregation, before it


@dataclass(frozen=True)
class Row:
    """One line of the table: overrides of the experiment, and runs of the published code as (after, before)."""

    name: str
    title: str
    overrides: tuple[str, ...]
    reference: tuple[tuple[float, float], ...] = ()


# The published code on the same data with the same settings, seeds 0 and 1.
ROWS = (
    Row("fedcac-10", "FedCAC, beta 10", (f"{BETA}=10",), ((0.929, 0.932), (0.951, 0.946))),
    Row("fedcac-100", "FedCAC, beta 100", (f"{BETA}=100",), ((0.771, 0.936), (0.848, 0.938))),
    Row("fedavg", "FedAvg", (f"{GROUP}=fedavg",), ((0.740, 0.936), (0.813, 0.942))),
    Row("local", "local", (f"{GROUP}=local",), ((0.932, 0.932), (0.941, 0.941))),
)
TOLERANCE = 0.02
LEAST = 0.92  # of FedCAC with beta 10, after aggregation


def run_row(row: Row, draws: str, seed: int, runs: Path) -> Path:
    """Run one row on one draw of clients unless that has been done; return its folder."""
    folder = runs / f"{draws}-{row.name}-{seed}"
    status = folder / "STATUS"
    if not (status.is_file() and status.read_text().strip() == "done"):
        shutil.rmtree(folder, ignore_errors=True)  # of a run that was interrupted
        settings = ["experiment=fedcac_fashion", *DRAWS[draws], f"seed={seed}", f"run_dir={folder}"]
        settings += [*QUICK, *row.overrides]
        run(compose(settings, CONFIGS), settings, CONFIGS, quiet=True)
    return folder


def measure(folder: Path) -> dict[str, Any]:
    """Return a run's accuracies by phase in the last round: mean, worst tenth and each client's."""
    summary = json.loads((folder / "summary.json").read_text())
    table = pd.read_parquet(folder / "metrics.parquet")
    table = table[table["name"] == "accuracy"]
    found: dict[str, Any] = {"seconds": summary["wall_time"]}
    for phase in PHASES:
        by_round = table[table["phase"] == phase].pivot_table(index="round", columns="client", values="value")
        clients = by_round.iloc[-1]
        worst = np.sort(clients.to_numpy())[: max(1, len(clients) // 10)]
        found[phase] = {
            "mean": round(float(clients.mean()), 4),
            "worst_tenth": round(float(worst.mean()), 4),
            "clients": {str(client): round(float(value), 4) for client, value in clients.items()},
        }
    return found


def interval(values: Sequence[float]) -> str:
    """Return the mean and the half-width of its 95 % t interval."""
    mean, count = float(np.mean(values)), len(values)
    if count < 2:
        return f"{mean:.3f}"
    half = float(stats.t.ppf(0.975, count - 1) * np.std(values, ddof=1) / count**0.5)
    return f"{mean:.3f} ± {half:.3f}"


def column(results: dict[str, Any], row: str, phase: str, key: str = "mean") -> list[float]:
    """Return a number of every run of a row, in the order of the seeds."""
    return [run[phase][key] for run in results[row].values()]


def table(results: dict[str, Any]) -> str:
    """Return a row's means and worst tenths, after and before aggregation, as a Markdown table."""
    lines = [
        "| | after aggregation | worst tenth | before aggregation | worst tenth |",
        "|---|---|---|---|---|",
    ]
    for row in ROWS:
        cells = [interval(column(results, row.name, p, key)) for p in PHASES for key in ("mean", "worst_tenth")]
        lines.append(f"| {row.title} | {' | '.join(cells)} |")
    return "\n".join(lines)


def reference_table(results: dict[str, Any]) -> str:
    """Return each run on the published code's clients beside that code's own, as a Markdown table."""
    lines = [
        "| | after, seed 0 | reference | seed 1 | reference | before, seed 0 | reference | seed 1 | reference |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in ROWS:
        cells = [
            f"{value:.3f} | {one[i]:.3f}"
            for i, phase in enumerate(PHASES)
            for value, one in zip(column(results, row.name, phase), row.reference, strict=True)
        ]
        lines.append(f"| {row.title} | {' | '.join(cells)} |")
    return "\n".join(lines)


def client_table(results: dict[str, Any]) -> str:
    """Return each client's accuracy after aggregation, seed by seed, as a Markdown table."""
    clients = list(next(iter(results[ROWS[0].name].values()))["personal"]["clients"])
    lines = [f"| | seed | {' | '.join(clients)} |", "|" + "---|" * (len(clients) + 2)]
    for row in ROWS:
        for seed, one in results[row.name].items():
            cells = [f"{one['personal']['clients'][client]:.2f}" for client in clients]
            lines.append(f"| {row.title} | {seed} | {' | '.join(cells)} |")
    return "\n".join(lines)


def missed(results: dict[str, Any]) -> list[str]:
    """Return in words which marks are missed; FedAvg before aggregation is FedAvg with fine-tuning."""
    wrong = []
    for draws, found in results.items():
        after = {row.name: float(np.mean(column(found, row.name, "personal"))) for row in ROWS}
        if after["fedcac-10"] < LEAST:
            wrong.append(f"{draws}: FedCAC (10) has {after['fedcac-10']:.3f} after aggregation, less than {LEAST}")
        if not after["fedcac-10"] > after["fedcac-100"] > after["fedavg"]:
            wrong.append(f"{draws}: not FedCAC (10) > FedCAC (100) > FedAvg: {after}")
    by_name = {row.name: row for row in ROWS}
    for name, title, phase in (("local", "local", 0), ("fedavg", "FedAvg", 0), ("fedavg", "FedAvg + fine-tuning", 1)):
        ours = float(np.mean(column(results["published"], name, PHASES[phase])))
        theirs = float(np.mean([one[phase] for one in by_name[name].reference]))
        if abs(ours - theirs) > TOLERANCE:
            wrong.append(f"published: {title} {ours:.3f}, reference {theirs:.3f}")
    return wrong


def write_tables(readme: Path, tables: dict[str, str]) -> None:
    """Put each table between its pair of comments."""
    text = readme.read_text(encoding="utf-8")
    for name, content in tables.items():
        before, _, rest = text.partition(f"<!-- {name} -->")
        after = rest.partition(f"<!-- /{name} -->")[2]
        text = f"{before}<!-- {name} -->\n{content}\n<!-- /{name} -->{after}"
    readme.write_text(text, encoding="utf-8")


def main() -> int:
    """Play, measure, write; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "fedcac_fashion")
    runs = parser.parse_args().runs.resolve()
    sys.path += [str(folder) for folder in CONFIGS]  # where the partitioner lies
    results: dict[str, Any] = {
        draws: {
            row.name: {str(seed): measure(run_row(row, draws, seed, runs)) for seed in SEEDS[draws]} for row in ROWS
        }
        for draws in DRAWS
    }
    (HERE / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    tables = {
        "reference": reference_table(results["published"]),
        "table": table(results["fedcl"]),
        "clients": client_table(results["fedcl"]),
    }
    write_tables(HERE / "README.md", tables)
    wrong = missed(results)
    print("\n\n".join([*tables.values(), "\n".join(wrong) or "every mark is met"]))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
