"""How far is a late change from the one the client would make now? Each corrector's answer against its age.

    FEDCL_DATA=<folder with fashion_mnist/> python benchmarks/staleness_fashion/estimation.py

Plays synchronous rounds, keeps every global model, then asks one client of each class what it would change in the last
one and in older ones: the first is the truth, which only a simulation has. Adds to estimation.json beside this file;
gate.py reads it.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedcl.assembly import Settings, client_runtime
from fedcl.base.randomness import torch_generator
from fedcl.client.local_data import PartitionedData
from fedcl.client.runtime import ClientRuntime
from fedcl.client.state import MemoryStateStore
from fedcl.config.compose import compose
from fedcl.contracts.strategy import GLOBAL, LocalWork, Staleness, Update
from fedcl.messages import Request
from fedcl.models.flat import FlatModel
from fedcl.models.networks import Dropout, Network, Output, build_model
from fedcl.runs.setup import Setup
from fedcl.scenario.task import Task
from fedcl.server.selection import select
from fedcl.server.state import at_once
from strategies.staleness.dc_asgd import DCASGD
from strategies.staleness.gradient_inversion import GradientInversion
from strategies.staleness.weighting import Weighting

HERE = Path(__file__).resolve().parent
EACH, CLIENTS, CHOSEN = 100, 100, 10
SETTINGS = (
    "strategy/projection=none", "data=fashion_mnist", f"data.source.train_limit={EACH * CLIENTS}",
    "data.source.test_limit=1000", "data/partition=shards", "data.partition.shards_per_client=1",
    "scenario=joint", "model=lenet", "backend=inline", "device=cpu", "compare_with=null",
    f"num_clients={CLIENTS}", f"clients_per_round={CHOSEN}", "client.epochs=5", f"client.batch_size={EACH}",
    "client.optimizer.lr=0.05",
)  # fmt: skip
FREE: dict[str, Any] = {"max_residual": 1e9, "switch_after": None}  # no gate, no switch: what inversion itself answers
SEARCHES: dict[str, dict[str, Any]] = {
    "inversion": {},
    "inversion, 40 steps": {"iterations": 40},
    "inversion, 12 steps": {"iterations": 12},
    "inversion, normal start": {"spread": 1.0, "label_spread": 1.0},
    "inversion, 8 samples": {"samples": 8},
    "inversion, 32 samples": {"samples": 32},
    "inversion, lr 0.1": {"lr": 0.1},
    "inversion, 400 steps": {"iterations": 400},
    "inversion, top 5 %": {"top": 0.05},
    "inversion, official": {"variant": "official", "lr": 1.0},
}


class Channels(Dropout):
    """Dropout of whole channels."""

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x`` (B, C, H, W) with channels dropped."""
        return x * super().forward(torch.ones_like(x[:, :, :1, :1]))


class Published(Network):
    """The published code's network: two convolutions of 5x5, channel dropout, 50 features, dropout."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 10, 5), nn.Conv2d(10, 20, 5)
        self.channels, self.dropout = Channels(p), Dropout(p)
        self.fc1 = nn.Linear(320, 50)
        self.attach_heads(50, (10,))

    def forward(self, x: Tensor) -> Output:
        """Map images (B, 1, 28, 28) to logits (B, 10) and features (B, 50)."""
        x = F.relu(F.max_pool2d(self.conv1(x), 2))
        x = F.relu(F.max_pool2d(self.channels(self.conv2(x)), 2))
        return self.classify(self.dropout(F.relu(self.fc1(x.flatten(1)))))


NETWORKS = {"published": 0.0, "published, dropout": 0.5}


@dataclass
class Past:
    """The last round of a run, every global model before it, and a client of each class; a view for correctors."""

    runtime: ClientRuntime
    task: Task
    work: LocalWork
    holders: dict[int, str]
    clients: tuple[str, ...]
    seed: int
    models: list[Tensor] = field(default_factory=list)
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    now: float = 0.0

    @property
    def spec(self) -> Any:
        """Layout of a model vector."""
        return self.work.model.spec

    @property
    def global_model(self) -> Tensor:
        """The last model."""
        return self.models[-1]

    @property
    def version(self) -> int:
        """Its version."""
        return len(self.models) - 1

    def model_of(self, client: str) -> Tensor:
        """Return the last model."""
        return self.models[-1]

    def model_at(self, target: str) -> Tensor:
        """Return the last model."""
        return self.models[-1]

    def rng(self, purpose: str) -> torch.Generator:
        """Return a generator keyed by (seed, version, purpose)."""
        return torch_generator(self.seed, "server", self.version, purpose)

    compute = staticmethod(at_once)

    def change(self, client: str, version: int, visit: int = 0) -> Update:
        """Return what ``client`` makes of the global model of ``version``, as an update that arrives now."""
        base = self.models[version]
        request = Request("train", client, visit, -1, 0, version, self.task)
        reply = self.runtime.visit(replace(request, model=base), MemoryStateStore())
        assert reply.model is not None
        count = reply.num_examples
        age = len(self.models) - 1 - version
        return Update(client, visit, GLOBAL, version, base, reply.model, count, float(count), 0, 0, age)


def run_row(network: str, seed: int, rounds: int) -> Past:
    """Play synchronous rounds of the clients' plain mean."""
    cfg = compose([*SETTINGS, f"data.root={os.environ['FEDCL_DATA']}/fashion_mnist", f"seed={seed}"])
    setup = Setup.of(cfg)
    data = PartitionedData(setup.dataset, setup.partition, setup.clients)
    runtime = client_runtime(cfg, data)
    if network != "lenet":
        runtime.model = FlatModel(build_model(lambda: Published(NETWORKS[network]), seed=seed))
    labels = {
        client: int(np.bincount(setup.dataset.train.y[part]).argmax())
        for client, part in zip(setup.clients, setup.partition.train, strict=True)
    }
    holders = {label: next(c for c in setup.clients if labels[c] == label) for label in range(10)}
    work = LocalWork(runtime.model.copy(), Settings.of(cfg).training, setup.stream, setup.dataset.input_shape)
    past = Past(runtime, setup.stream.train_task(0), work, holders, setup.clients, seed, [runtime.model.vector()])
    for server_round in range(rounds):
        chosen = select(setup.clients, CHOSEN, seed=seed, server_round=server_round)
        deltas = [past.change(client, server_round, server_round).delta for client in chosen]
        past.models.append((past.models[-1].double() + torch.stack(deltas).mean(0)).float())
    return past


def correctors(names: list[str]) -> dict[str, Staleness]:
    """Return the correctors that are compared."""
    plain: dict[str, Staleness] = {
        "late change": Weighting(rule="unweighted"),
        "exponential weight": Weighting(rule="exponential"),
        "dc_asgd": DCASGD(),
    }
    return plain | {name: GradientInversion(**{**FREE, **SEARCHES[name]}) for name in names}


def measure(past: Past, label: int, age: int, names: list[str]) -> list[dict[str, Any]]:
    """Return each corrector's cosine distance, relative L1 error and cost for one late change."""
    client, last = past.holders[label], past.version
    late, true = past.change(client, last - age, 1000), past.change(client, last, 1001).delta
    rows = []
    for name, part in correctors(names).items():
        part.setup(past.spec)
        part.bind(past.work)
        started = time.process_time()
        (new,) = part.admit([late], past)
        rows.append(
            {
                "corrector": name,
                "class": label,
                "age": age,
                "cosine_distance": 1 - float(F.cosine_similarity(new.delta, true, dim=0)),
                "l1": float((new.delta - true).abs().sum() / true.abs().sum()),
                "l2": float((new.delta - true).norm() / true.norm()),
                "residual": part.metrics().get("residual"),
                "iterations": part.metrics().get("iterations"),
                "cpu_seconds": time.process_time() - started,
            }
        )
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Return median cosine distance / relative L1 error by network, corrector and age, as Markdown."""
    ages = sorted({row["age"] for row in rows})
    lines = ["| | clients | " + " | ".join(f"age {age}" for age in ages) + " | residual | CPU s |"]
    lines.append("|---|---|" + "---|" * (len(ages) + 2))
    for network, name in dict.fromkeys((row["network"], row["corrector"]) for row in rows):
        mine = [row for row in rows if (row["network"], row["corrector"]) == (network, name)]
        cells = []
        for age in ages:
            at = [row for row in mine if row["age"] == age]
            cells.append(" / ".join(f"{np.median([r[key] for r in at]):.3f}" for key in ("cosine_distance", "l1"))
                         if at else "-")  # fmt: skip
        left = [row["residual"] for row in mine if row["residual"] is not None]
        lines.append(
            f"| {network}: {name} | {len({(r['seed'], r['class']) for r in mine})} | {' | '.join(cells)} | "
            f"{f'{np.median(left):.3f}' if left else '-'} | {np.median([r['cpu_seconds'] for r in mine]):.1f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Measure, and add to estimation.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", choices=["lenet", *NETWORKS], default="lenet")
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--classes", type=int, nargs="+", default=list(range(10)))
    parser.add_argument("--ages", type=int, nargs="+", default=[10, 20, 40])
    parser.add_argument("--searches", nargs="*", choices=list(SEARCHES), default=["inversion"])
    args = parser.parse_args()
    file = HERE / "estimation.json"
    kept: dict[tuple[Any, ...], dict[str, Any]] = {}
    keys = ("network", "corrector", "seed", "class", "age")
    for row in json.loads(file.read_text()) if file.is_file() else []:
        kept[tuple(row[key] for key in keys)] = row
    for seed in args.seeds:
        past = run_row(args.network, seed, args.rounds)
        for age in args.ages:
            for label in args.classes:
                for row in measure(past, label, age, args.searches):
                    row = {"network": args.network, "seed": seed} | row
                    kept[tuple(row[key] for key in keys)] = row
            file.write_text("[\n" + ",\n".join(json.dumps(row) for row in kept.values()) + "\n]\n")
            print(table(list(kept.values())), flush=True)


if __name__ == "__main__":
    main()
