"""Does correcting late updates help? Every corrector end to end, where one class is with late clients alone.

    FEDCL_DATA=<folder with fashion_mnist/> python benchmarks/staleness_fashion/run.py

Settings are those of `experiment=staleness_fashion`, with devices of its own for each seed and age (--devices keeps
them). Adds to results.json beside this file, skipping what is there, and writes the table into README.md.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch.nn.functional as F
from scipy import stats
from torch import Tensor

from fedcl.assembly import client_runtime
from fedcl.client.local_data import PartitionedData
from fedcl.client.runtime import ClientRuntime
from fedcl.client.state import MemoryStateStore
from fedcl.config.compose import compose
from fedcl.contracts.strategy import Staleness, Update
from fedcl.contracts.view import ServerView
from fedcl.messages import Request
from fedcl.results.recorder import Recorder
from fedcl.runs.setup import Setup, make_server
from fedcl.server.strategy import Pipeline
from fedcl.simulation.backend import open_backend
from strategies.staleness.rebase import rebased

HERE = Path(__file__).resolve().parent
LATE_CLASS = 5  # sandals
FRESH = 10  # updates of age 0 a round, about
LAST = 0.25  # share of the rounds whose tests are averaged
INVERSION = "strategy.staleness.server"
METHODS: dict[str, tuple[str, ...]] = {
    "wait": ("strategy/staleness=none",),
    "oracle": ("strategy/staleness=none",),
    "drop": ("strategy/staleness=drop",),
    "unweighted": ("strategy/staleness=unweighted",),
    "exponential": ("strategy/staleness=exponential",),
    "sigmoid": ("strategy/staleness=sigmoid",),
    "fedbuff": ("strategy/staleness=fedbuff",),
    "fedasync": ("strategy/staleness=fedasync",),
    "dc_asgd": ("strategy/staleness=dc_asgd",),
    "dc_asgd_adaptive": ("strategy/staleness=dc_asgd_adaptive",),
    "weight_prediction": ("strategy/staleness=weight_prediction",),
    "gradient_inversion": ("strategy/staleness=gradient_inversion",),
}


def _distance(told: Tensor, true: Tensor) -> float:
    return max(0.0, 1 - float(F.cosine_similarity(told, true, dim=0)))


@dataclass
class Watched(Staleness):
    """A corrector, with every late update's error against what its client would really do now, and its seconds.

    With ``oracle`` the truth itself enters.
    """

    part: Staleness
    runtime: ClientRuntime
    task: Any
    oracle: bool
    errors: list[dict[str, float]] = field(default_factory=list)
    seconds: float = 0.0

    def outgoing(self, model: Any, client: str, view: ServerView) -> Any:
        """As the part does."""
        return self.part.outgoing(model, client, view)

    def observe(self, update: Update, view: ServerView) -> None:
        """As the part does."""
        self.part.observe(update, view)

    def admit(self, updates: list[Update], view: ServerView) -> list[Update]:
        """As the part does, or the truth."""
        started = time.process_time()
        admitted = {update.client: update for update in self.part.admit(updates, view)}
        self.seconds += time.process_time() - started
        for update in (one for one in updates if one.age):
            now = view.model_of(update.client)
            request = Request("train", update.client, update.visit, -1, 0, update.base_version, self.task)
            reply = self.runtime.visit(replace(request, model=now), MemoryStateStore())
            assert reply.model is not None
            true = reply.model.double() - now.double()
            if self.oracle:
                admitted[update.client] = rebased(update, true, view)
            new = admitted.get(update.client)
            entered = {} if new is None else {"new": _distance(new.delta, true)}
            self.errors.append({"age": update.age, "late": _distance(update.delta, true)} | entered)
        return [admitted[update.client] for update in updates if update.client in admitted]

    def metrics(self) -> dict[str, float]:
        """As the part does."""
        return self.part.metrics()


def write_devices(setup: Setup, age: int, file: Path) -> int:
    """Write a trace in which clients that hold the late class answer ``age`` rounds later; return how many they are."""
    late = 0
    with file.open("w", newline="") as stream:
        rows = csv.writer(stream)
        rows.writerow(("client", "latency"))
        for client, part in zip(setup.clients, setup.partition.train, strict=True):
            holds = bool((setup.dataset.train.y[part] == LATE_CLASS).any())
            late += holds
            rows.writerow((client, age + 0.5 if holds else 0))
    return late


def in_flight(clients: int, late: int, age: int) -> int:
    """Return how many late clients are under way once as many leave as arrive, with FRESH idle clients selected."""
    under_way = 0.0
    for _ in range(1000):
        under_way += FRESH * (late - under_way) / (clients - under_way) - under_way / age
    return round(under_way)


@cache
def _setup(overrides: tuple[str, ...]) -> Setup:
    return Setup.of(compose(overrides))


def run_row(method: str, age: int, seed: int, devices: Path, extra: Sequence[str]) -> dict[str, Any]:
    """Run one method; return its accuracies (percent), errors and costs."""
    common = ["experiment=staleness_fashion", f"data.root={os.environ['FEDCL_DATA']}/fashion_mnist", f"seed={seed}",
              *extra]  # fmt: skip
    setup = _setup(tuple(common))
    file = devices / f"seed{seed}-age{age}.csv"
    late = write_devices(setup, age, file)
    slots = FRESH + in_flight(len(setup.clients), late, age)
    timing = [f"devices.path={file}", f"clients_per_round={slots}"]
    if method == "wait":
        timing = [f"devices.path={file}", "async.deadline=null", f"clients_per_round={FRESH}"]
    cfg = compose([*common, *timing, *METHODS[method]])
    data = PartitionedData(setup.dataset, setup.partition, setup.clients)
    runtime = client_runtime(cfg, data)
    curve: list[tuple[float, float]] = []
    with (
        tempfile.TemporaryDirectory() as folder,
        open_backend(cfg, setup.dataset, setup.partition) as backend,
        Recorder(Path(folder)) as recorder,
    ):
        server = make_server(cfg, setup, backend, recorder)
        assert isinstance(server.strategy, Pipeline)
        assert server.measurement.evaluator is not None
        watched = Watched(server.strategy.staleness, runtime, setup.stream.train_task(0), method == "oracle")
        server.strategy.staleness = watched
        evaluator, rounds = server.measurement.evaluator, server.schedule.num_rounds

        def test(server_round: int) -> None:
            if server_round >= (1 - LAST) * rounds:
                by_class = evaluator.accuracy_by_class(server.global_model, [0])
                curve.append((100 * by_class[LATE_CLASS], 100 * float(np.mean(list(by_class.values())))))

        server.run(test)
    affected, overall = np.mean(curve, axis=0)
    count, entered = len(watched.errors), [e["new"] for e in watched.errors if "new" in e]
    return {
        "method": method, "age": age, "seed": seed, "affected": float(affected), "overall": float(overall),
        "late_updates": count,
        "mean_age": float(np.mean([e["age"] for e in watched.errors])) if count else 0.0,
        "error_late": float(np.median([e["late"] for e in watched.errors])) if count else None,
        "error": float(np.median(entered)) if entered else None,
        "seconds": watched.seconds / count if count else 0.0,
        "part": watched.metrics(),
    }  # fmt: skip


def interval(values: Sequence[float]) -> str:
    """Return mean and half-width of the 95 % t interval."""
    mean, count = float(np.mean(values)), len(values)
    if count < 2:
        return f"{mean:.1f}"
    return f"{mean:.1f} ± {stats.t.ppf(0.975, count - 1) * np.std(values, ddof=1) / count**0.5:.1f}"


def _errors(rows: Sequence[dict[str, Any]]) -> str:
    """Return the mean over seeds of the median error of the changes as they came, and of those that entered."""
    pairs = ([row[key] for row in rows if row[key] is not None] for key in ("error_late", "error"))
    return ", ".join(f"{max(0.0, float(np.mean(values))):.3f}" if values else "-" for values in pairs)


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Return affected / overall accuracy by method and age, errors and seconds, as Markdown."""
    ages = sorted({row["age"] for row in rows})
    lines = [
        "| | "
        + " | ".join(f"age {age}: affected | overall" for age in ages)
        + " | error: late, entered | s a correction |",
        "|---|" + "---|" * (2 * len(ages) + 2),
    ]
    for method in METHODS:
        mine = [row for row in rows if row["method"] == method]
        if not mine:
            continue
        cells = []
        for age in ages:
            at = [row for row in mine if row["age"] == age]
            cells += [interval([row[key] for row in at]) if at else "-" for key in ("affected", "overall")]
        shown = " / ".join(_errors([row for row in mine if row["age"] == age]) for age in ages)
        lines.append(f"| {method} | {' | '.join(cells)} | {shown} | {np.mean([r['seconds'] for r in mine]):.2f} |")
    return "\n".join(lines)


def main() -> None:
    """Play, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--ages", type=int, nargs="+", default=[10, 20, 40])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--devices", type=Path, default=None, help="folder for the traces")
    parser.add_argument("--results", type=Path, default=HERE / "results.json")
    parser.add_argument("extra", nargs="*", help="further overrides")
    args = parser.parse_args()
    kept: dict[tuple[str, int, int], dict[str, Any]] = {}
    for row in json.loads(args.results.read_text()) if args.results.is_file() else []:
        kept[row["method"], row["age"], row["seed"]] = row
    with tempfile.TemporaryDirectory() as folder:
        for seed, age, method in product(args.seeds, args.ages, args.methods):
            first = (method, args.ages[0], seed)
            if method == "wait" and first in kept:  # nobody is late: one age is as another
                kept.setdefault((method, age, seed), kept[first] | {"age": age})
            if (method, age, seed) in kept:
                continue
            started = time.process_time()
            row = run_row(method, age, seed, args.devices or Path(folder), args.extra)
            kept[method, age, seed] = row | {"cpu_seconds": time.process_time() - started}
            print(json.dumps(kept[method, age, seed]), flush=True)
            lines = ",\n".join(json.dumps(one) for one in kept.values())
            args.results.write_text(f"[\n{lines}\n]\n", encoding="utf-8")
    text = table(list(kept.values()))
    print(text)
    if args.results == HERE / "results.json":
        readme = HERE / "README.md"
        before, _, rest = readme.read_text(encoding="utf-8").partition("<!-- table -->")
        after = rest.partition("<!-- /table -->")[2]
        readme.write_text(f"{before}<!-- table -->\n{text}\n<!-- /table -->{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
