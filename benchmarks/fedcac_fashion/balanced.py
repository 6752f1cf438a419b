"""Does FedCAC with balanced clients beat learning alone and FedAvg with fine-tuning? Two settings, paired over seeds.

    FEDCL_DATA=... python benchmarks/fedcac_fashion/balanced.py

Finished runs are kept under --runs and not repeated; writes balanced.json and the table.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from scipy import stats

from fedcl.config.compose import compose
from fedcl.runs.experiment import run

HERE = Path(__file__).resolve().parent
GROUP = "strategy/collaboration"
COMMON = (
    "backend=inline", "scenario=joint", "data/partition=dirichlet_client", "data.partition.alpha=0.1",
    "strategy/projection=none", "client.optimizer.lr=0.05", "client.optimizer.momentum=0.9", "evaluation.personal=true",
    "evaluation.every=0", "compare_with=null", "checkpoint.every=0", "figures=false",
)  # fmt: skip


class Setting(NamedTuple):
    """Data, network and schedule of one half of the comparison."""

    name: str
    title: str
    rounds: int
    overrides: tuple[str, ...]


SETTINGS = (
    Setting("fashion", "Fashion-MNIST", 20, (
        "data=fashion_mnist", "model=mlp", "model.hidden=[128,64]", "num_clients=20", "client.epochs=5",
        "data.partition.train_size=100", "data.partition.test_size=500", "client.batch_size=20",
    )),
    Setting("cifar100", "CIFAR-100", 12, (
        "data=cifar100_subset", "model=lenet", "num_clients=10", "client.epochs=2",
        "data.partition.train_size=300", "data.partition.test_size=100", "client.batch_size=25",
    )),
)  # fmt: skip


class Method(NamedTuple):
    """Overrides, and which rows of the metrics are the model that a client would use after the last aggregation.

    ``extra_rounds=1`` with phase ``trained`` is fine-tuning: one more local training, from the last aggregated model.
    """

    name: str
    title: str
    overrides: tuple[str, ...]
    phase: str = "personal"
    extra_rounds: int = 0


METHODS = (
    Method("balanced", "FedCAC, balanced", (f"{GROUP}=fedcac_balanced",)),
    Method("local", "local", (f"{GROUP}=local",)),
    Method("fedavg_ft", "FedAvg + fine-tuning", (f"{GROUP}=fedavg",), "trained", 1),
    Method("fedavg_balanced", "the same without critical parameters", (
        f"{GROUP}=fedcac_balanced", "strategy.collaboration.server.tau=1e-9",
    )),
)  # fmt: skip
OURS = METHODS[0].name


def run_row(setting: Setting, method: Method, seed: int, runs: Path) -> list[float]:
    """Run one method with one seed unless that has been done; return each client's accuracy."""
    folder = runs / f"{setting.name}-{method.name}-{seed}"
    status = folder / "STATUS"
    if not (status.is_file() and status.read_text().strip() == "done"):
        shutil.rmtree(folder, ignore_errors=True)  # of a run that was interrupted
        rounds = setting.rounds + method.extra_rounds
        settings = [*COMMON, *setting.overrides, *method.overrides, f"rounds_per_task={rounds}"]
        settings += [f"seed={seed}", f"run_dir={folder}"]
        run(compose(settings), settings, [], quiet=True)
    table = pd.read_parquet(folder / "metrics.parquet")
    table = table[(table["name"] == "accuracy") & (table["phase"] == method.phase)]
    last = table[table["round"] == table["round"].max()]
    return [round(float(value), 4) for value in last.sort_values("client")["value"]]


def interval(values: Sequence[float]) -> str:
    """Return the mean and the half-width of its 95 % t interval."""
    half = stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / len(values) ** 0.5
    return f"{np.mean(values):.4f} ± {half:.4f}"


def table(results: dict[str, Any]) -> str:
    """Return means, worst tenths and what the balanced FedCAC is ahead by, paired over seeds, as a Markdown table."""
    lines = ["| | | mean over clients | worst tenth | balanced FedCAC is ahead by | p |", "|---|---|---|---|---|---|"]
    for setting in (s for s in SETTINGS if s.name in results):
        runs = results[setting.name]
        means = {name: [float(np.mean(one)) for one in by_seed.values()] for name, by_seed in runs.items()}
        for method in METHODS:
            if method.name not in runs:
                continue
            worst = [float(np.mean(np.sort(one)[: max(1, len(one) // 10)])) for one in runs[method.name].values()]
            cells = [setting.title, method.title, interval(means[method.name]), interval(worst)]
            if method.name == OURS:
                cells += ["", ""]
            else:
                ahead = [ours - theirs for ours, theirs in zip(means[OURS], means[method.name], strict=True)]
                cells += [interval(ahead), f"{stats.ttest_1samp(ahead, 0).pvalue:.2g}"]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Play, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--settings", nargs="+", default=[s.name for s in SETTINGS])
    parser.add_argument("--methods", nargs="+", default=[m.name for m in METHODS])
    parser.add_argument("--runs", type=Path, default=HERE.parents[1] / "runs" / "fedcac_balanced")
    args = parser.parse_args()
    out, readme = HERE / "balanced.json", HERE / "README.md"
    results: dict[str, Any] = json.loads(out.read_text()) if out.is_file() else {}
    for setting in (s for s in SETTINGS if s.name in args.settings):
        for method in (m for m in METHODS if m.name in args.methods):
            for seed in args.seeds:
                accuracies = run_row(setting, method, seed, args.runs.resolve())
                results.setdefault(setting.name, {}).setdefault(method.name, {})[str(seed)] = accuracies
                out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
                print(setting.name, method.name, seed, round(float(np.mean(accuracies)), 4), flush=True)
    before, _, rest = readme.read_text(encoding="utf-8").partition("<!-- balanced -->")
    text = table(results)
    after = rest.partition("<!-- /balanced -->")[2]
    readme.write_text(f"{before}<!-- balanced -->\n{text}\n<!-- /balanced -->{after}", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
