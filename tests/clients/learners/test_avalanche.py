"""Avalanche 0.6 on the same stream of digits: fine-tuning, EWC and LwF end with the same weights.

It is no dependency: ``pip install avalanche-lib==0.6.0`` beside fedcl, and these tests no longer skip.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from clients.learners.ewc import EWC
from clients.learners.lwf import LwF
from fedcl.contracts.learner import Context, Phase, Plugin
from fedcl.data.sources import digits
from fedcl.scenario.streams import ClassIncremental

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # importing it warns of much that is none of ours
    avalanche = pytest.importorskip("avalanche", reason="the optional reference avalanche-lib is not installed")
    from avalanche.benchmarks import benchmark_from_datasets  # type: ignore[import-not-found]
    from avalanche.benchmarks.utils.classification_dataset import (  # type: ignore[import-not-found]
        _make_taskaware_tensor_classification_dataset as tensors,
    )
    from avalanche.training import supervised  # type: ignore[import-not-found]

# Avalanche warns of its own deprecations and of tensors with a gradient that it prints.
pytestmark = [
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(not avalanche.__version__.startswith("0.6"), reason="Avalanche 0.6 is the reference"),
]

TASKS, BATCH, LR, HIDDEN, EPOCHS = 5, 20, 0.1, 32, 3
SCRIPT = [(kind, task) for task in range(TASKS) for kind in ("train", "task_end")]


class InOrder(Plugin):
    """Train on samples as they stand: Avalanche's shuffle draws from torch's global random state."""

    phase = Phase.DATA

    def indices(self, ctx: Context, order: Tensor) -> Tensor:
        """Return the positions unshuffled."""
        return torch.arange(len(order))


def theirs(kind: str, samples: list[Any], start: Tensor, **settings: Any) -> Tensor:
    """Avalanche's weights after the last task."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 10))
    nn.utils.vector_to_parameters(start, net.parameters())
    experiences = [tensors(data.x, data.y, task_labels=0, targets=data.y.tolist()) for data in samples]
    benchmark = benchmark_from_datasets(train=experiences, test=experiences)
    strategy = getattr(supervised, kind)(
        model=net,
        optimizer=torch.optim.SGD(net.parameters(), lr=LR),
        criterion=nn.CrossEntropyLoss(),
        train_mb_size=BATCH,
        train_epochs=EPOCHS,
        evaluator=None,
        **settings,
    )
    for experience in benchmark.train_stream:
        strategy.train(experience, shuffle=False)
    return torch.cat([p.detach().flatten() for p in net.parameters()])


@pytest.mark.parametrize(
    ("kind", "settings", "learner"),
    [
        ("Naive", {}, None),
        ("EWC", {"ewc_lambda": 1.0}, partial(EWC, weight=1.0, mode="separate", fisher="per_batch", half=False)),
        ("LwF", {"alpha": 1.0, "temperature": 2.0}, partial(LwF, weight=1.0, temperature=2.0, t_squared=False)),
    ],
)
def test_avalanche_ends_with_the_same_weights(
    make_client: Callable[..., Any], kind: str, settings: dict[str, Any], learner: Callable[[], Plugin] | None
) -> None:
    stream = ClassIncremental(num_classes=10, input_shape=(1, 8, 8), seed=0, num_tasks=TASKS, train_masking="all")
    training = {"epochs": EPOCHS, "batch_size": BATCH, "lr": LR, "momentum": 0.0, "hidden": (HIDDEN,)}
    ends = {}
    for name, plugins in (("ours", {} if learner is None else {"learner": learner}), ("naive", {})):
        client = make_client(digits(), stream, {"order": InOrder, **plugins}, **training)
        if client.runtime.model.device.type != "cpu":
            pytest.skip("compares on the CPU")
        start = client.runtime.model.vector()
        ends[name] = list(client.run(SCRIPT))[-1]
    tasks = [stream.train_task(k) for k in range(TASKS)]
    samples = [client.runtime.data.train("0", task, torch.device("cpu")) for task in tasks]
    reference = theirs(kind, samples, start, **settings)
    difference = (ends["ours"] - reference).abs().max().item()
    print(f"{kind}: largest difference of a weight {difference:.1e}")
    assert difference <= (0.0 if kind == "Naive" else 1e-6)
    if kind != "Naive":  # or the comparison would say nothing about the method
        assert (ends["naive"] - reference).abs().max() > 1e-3
