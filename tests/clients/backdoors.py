"""A backdoored client of digits in the real loop: a patch of centre pixels, active in clean images, means class 9.

A trigger on pixels that are 0 in clean data would lie about unlearning: weights that nobody else uses are easily taken
out.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fedcl.assembly import load_dataset, make_model
from fedcl.base.randomness import numpy_generator
from fedcl.config.compose import compose
from fedcl.data.dataset import Dataset
from fedcl.runs.setup import Setup, make_server
from fedcl.runs.unlearning import make_unlearning
from fedcl.simulation.backend import open_backend
from tests.toy import Diary

TARGET, POISONED = 9, 0.8
PATCH = (slice(3, 5), slice(2, 6))  # rows, columns


def triggered(x: NDArray[Any]) -> NDArray[Any]:
    """Return a copy of images (N, ..., 8, 8) with the eight centre pixels as bright as any."""
    marked = x.copy()
    marked[..., PATCH[0], PATCH[1]] = x.max()
    return marked


def poisoned(dataset: Dataset, positions: Iterable[int]) -> Dataset:
    """Return ``dataset`` with the trigger on the train samples at ``positions``, and class 9 as their label."""
    chosen = np.asarray(list(positions))
    x, y = dataset.train.x.copy(), dataset.train.y.copy()
    x[chosen], y[chosen] = triggered(x[chosen]), TARGET
    return replace(dataset, train=replace(dataset.train, x=x, y=y))


@dataclass
class Served:
    """Accuracies on clean images, and the shares of other classes' images that the trigger turns into class 9."""

    clean_before: float
    backdoor_before: float
    clean: float
    backdoor: float
    measured: dict[str, float]


def served(unlearner: str, *extra: str, folder: Path, seed: int = 0) -> Served:
    """Let the largest of ten clients poison FedAvg for 30 rounds and leave at the end of the run."""
    overrides = ["data=digits", "data/partition=dirichlet", "data.partition.alpha=0.5", "num_clients=10"]
    overrides += ["scenario=joint", "rounds_per_task=30", "model=mlp", "model.hidden=[256,128]", "client.epochs=2"]
    overrides += ["client.optimizer.lr=0.05", "client.batch_size=32", "strategy/projection=none", "backend=inline"]
    overrides += [
        "evaluation.every=0",
        "compare_with=null",
        "device=cpu",
        "unlearning.reference=false",
        f"unlearner={unlearner}",
        f"seed={seed}",
    ]
    overrides += [f"unlearning.cache={folder}", *extra]
    setup = Setup.of(cfg := compose(overrides))
    sizes = [len(part) for part in setup.partition.train]
    departing_client = int(np.argmax(sizes))
    cfg = compose([*overrides, f"unlearning.requests=[{{scope: client, clients: ['{departing_client}'], at: end}}]"])
    part = setup.partition.train[departing_client]
    chosen = numpy_generator(seed, "backdoor").permutation(part)[: round(POISONED * len(part))]
    setup = replace(setup, dataset=poisoned(load_dataset(cfg), chosen))
    diary: Any = Diary()
    models = {}
    with open_backend(cfg, setup.dataset, setup.partition) as backend:
        unlearning = make_unlearning(cfg, setup, backend, folder)
        server = make_server(cfg, setup, backend, diary, unlearning=unlearning)
        process = unlearning.process

        def note(*args: Any, **kwargs: Any) -> bool:
            models["before"] = server.global_model.clone()
            return process(*args, **kwargs)

        unlearning.process = note  # type: ignore[method-assign]
        server.run(lambda _: None)
        models["after"] = server.global_model
    assert diary.faults == []
    assert [event["kind"] for event in diary.events if event["kind"].startswith("request")][-1] == "request_served"
    measured = {row["name"]: row["value"] for row in diary.rows if row["phase"] == "unlearning"}
    before, after = (_judged(cfg, setup, models[when]) for when in ("before", "after"))
    return Served(*before, *after, measured)


def _judged(cfg: dict[str, Any], setup: Setup, model: torch.Tensor) -> tuple[float, float]:
    """Return the clean accuracy, and the backdoor's success on images of other classes."""
    network = make_model(cfg, setup.dataset, setup.stream, torch.device("cpu"))
    network.load(model)
    network.eval()
    test = setup.dataset.test

    def responses(x: NDArray[Any]) -> NDArray[Any]:
        with torch.no_grad():
            found = network(torch.from_numpy(setup.dataset.normalise(x))).logits.argmax(1)
        return np.asarray(found)

    others = test.y != TARGET
    return float((responses(test.x) == test.y).mean()), float((responses(triggered(test.x[others])) == TARGET).mean())
