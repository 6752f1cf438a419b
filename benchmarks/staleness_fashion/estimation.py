"""How far is a late change from the one the client would make now? Each corrector's answer against its age.

    FEDCL_DATA=<folder with fashion_mnist/> python benchmarks/staleness_fashion/estimation.py

Plays a synchronous run, keeps every global model, then asks a few clients what they would change in the last one and
in older ones: the first is the truth, which only a simulation has. Writes results.json beside this file.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedcl.client.runtime import ClientRuntime
from fedcl.client.state import MemoryStateStore
from fedcl.config import compose
from fedcl.messages import Request
from fedcl.prepared import Prepared, make_server
from fedcl.results.recorder import Recorder
from fedcl.scenario.task import Task
from fedcl.server.contracts import GLOBAL, LocalWork, ServerView, Staleness, Update
from fedcl.simulation.backend import open_backend
from fedcl.wiring import client_runtime, local_training, make_model, simulated_data
from strategies.staleness.dc_asgd import DCASGD
from strategies.staleness.gradient_inversion import GradientInversion
from strategies.staleness.weighting import Weighting

HERE = Path(__file__).resolve().parent
EACH = 100  # samples a client
CLIENTS = 50
SETTINGS = (
    "strategy/projection=none", "data=fashion_mnist", f"data.source.train_limit={EACH * CLIENTS}",
    "data.source.test_limit=1000", "data/partition=shards", "data.partition.shards_per_client=1",
    "scenario=joint", "model=lenet", "backend=inline", "device=cpu", "compare_with=null",
    f"num_clients={CLIENTS}", "clients_per_round=10", "client.epochs=5", f"client.batch_size={EACH}",
    "client.optimizer.lr=0.05", "evaluation.every=0", "checkpoint.every=0",
)  # fmt: skip


@dataclass
class Past:
    """The last round of a run, and every global model before it."""

    view: ServerView
    models: list[Tensor]
    runtime: ClientRuntime
    task: Task
    work: LocalWork

    def change(self, client: str, version: int) -> Update:
        """Return what ``client`` makes of the global model of ``version``, as an update that arrives now."""
        base = self.models[version]
        request = Request("train", client, 0, -1, 0, version, self.task)
        reply = self.runtime.visit(replace(request, model=base), MemoryStateStore())
        assert reply.model is not None
        age = len(self.models) - 1 - version
        count = reply.num_examples
        return Update(client, 0, GLOBAL, version, base, reply.model, count, float(count), 0, 0, age)


def play(seed: int, rounds: int) -> Past:
    """Play a synchronous run of ``rounds`` rounds."""
    cfg = compose([*SETTINGS, f"data.root={os.environ['FEDCL_DATA']}/fashion_mnist", f"rounds_per_task={rounds}",
                   f"seed={seed}"])  # fmt: skip
    prepared = Prepared.of(cfg)
    with (
        tempfile.TemporaryDirectory() as folder,
        open_backend(cfg, prepared.dataset, prepared.partition) as backend,
        Recorder(Path(folder)) as recorder,
    ):
        server = make_server(cfg, prepared, backend, recorder)
        models = [server.global_model.clone()]
        server.run(lambda _: models.append(server.global_model.clone()))
    data = simulated_data(prepared.dataset, prepared.partition, prepared.clients)
    runtime = client_runtime(cfg, data, prepared.dataset)
    model = make_model(cfg, prepared.dataset, prepared.stream, torch.device("cpu"))
    work = LocalWork(model, local_training(cfg), prepared.stream, prepared.dataset.input_shape)
    return Past(server, models, runtime, prepared.stream.train_task(0), work)


def correctors(past: Past, iterations: int) -> dict[str, Staleness]:
    """Return the correctors that are compared."""
    # no gate and no switch: what inversion itself answers
    inversion: dict[str, Any] = {"samples": 16, "iterations": iterations, "max_residual": 1e9, "switch_after": None}
    parts: dict[str, Staleness] = {
        "late change": Weighting(rule="unweighted"),
        "exponential weight": Weighting(rule="exponential"),
        "dc_asgd": DCASGD(),
        "inversion": GradientInversion(**inversion),
        "inversion, top 5 %": GradientInversion(**inversion, top=0.05),
        "inversion, official": GradientInversion(**{**inversion, "lr": 1.0}, variant="official"),
    }
    for part in parts.values():
        part.setup(past.view.spec)
        part.bind(past.work)
    return parts


def measure(past: Past, client: str, age: int, iterations: int) -> list[dict[str, Any]]:
    """Return each corrector's cosine distance and relative L1 error for one late change."""
    now = len(past.models) - 1
    late, true = past.change(client, now - age), past.change(client, now).delta
    rows = []
    for name, part in correctors(past, iterations).items():
        started = time.perf_counter()
        (new,) = part.admit([late], past.view)
        cosine = float(torch.nn.functional.cosine_similarity(new.delta, true, dim=0))
        rows.append(
            {
                "corrector": name,
                "client": client,
                "age": age,
                "cosine_distance": 1 - cosine,
                "l1": float((new.delta - true).abs().sum() / true.abs().sum()),
                "residual": part.metrics().get("residual"),
                "seconds": time.perf_counter() - started,
            }
        )
    return rows


def table(rows: list[dict[str, Any]], ages: list[int]) -> str:
    """Return mean cosine distance / L1 error by corrector and age, as Markdown."""
    lines = ["| | " + " | ".join(f"age {age}" for age in ages) + " | seconds |", "|---|" + "---|" * (len(ages) + 1)]
    for name in dict.fromkeys(row["corrector"] for row in rows):
        mine = [row for row in rows if row["corrector"] == name]
        cells = [
            " / ".join(f"{statistics.mean(r[key] for r in mine if r['age'] == age):.3f}" for key in
                       ("cosine_distance", "l1"))
            for age in ages
        ]  # fmt: skip
        lines.append(f"| {name} | " + " | ".join(cells) + f" | {statistics.mean(r['seconds'] for r in mine):.1f} |")
    return "\n".join(lines)


def main() -> None:
    """Measure and write results.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--clients", type=int, nargs="+", default=[3, 21, 37])
    parser.add_argument("--ages", type=int, nargs="+", default=[5, 20, 40])
    parser.add_argument("--iterations", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    past = play(args.seed, args.rounds)
    rows: list[dict[str, Any]] = []
    for client in args.clients:
        for age in args.ages:
            rows += measure(past, str(client), age, args.iterations)
            print(json.dumps(rows[-6:]), flush=True)
    (HERE / "results.json").write_text(json.dumps({"settings": vars(args), "rows": rows}, indent=1) + "\n")
    print(table(rows, args.ages))


if __name__ == "__main__":
    main()
