"""Learners help where they should."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from torch import Tensor

from clients.learners.er import ER
from clients.learners.ewc import EWC
from clients.learners.lwf import LwF
from fedcl.contracts.learner import Plugin
from fedcl.data.dataset import Dataset
from fedcl.data.sources import digits
from fedcl.evaluation.evaluator import Evaluator
from fedcl.scenario.domains import DomainPermuted
from fedcl.scenario.streams import ClassIncremental, TaskIncremental
from fedcl.scenario.task import Stream

Plugins = dict[str, Callable[[], Plugin]]
LEARNERS: dict[str, Plugins] = {"ewc": {"ewc": EWC}, "lwf": {"lwf": LwF}}


def stream(kind: type[Any], dataset: Dataset, tasks: int = 3, **extra: Any) -> Stream:
    made: Stream = kind(
        num_classes=dataset.num_classes, input_shape=dataset.input_shape, seed=0, num_tasks=tasks, **extra
    )
    return made


@pytest.fixture(scope="module")
def handwritten() -> Dataset:
    return digits()


def final_accuracy(
    dataset: Dataset, kind: type[Any], plugins: Plugins, make_client: Callable[..., Any], **training: float
) -> list[float]:
    """Test accuracy on each of five tasks after the last."""
    tasks = stream(kind, dataset, 5)
    client = make_client(dataset, tasks, plugins, hidden=(32,), batch_size=20, **training)
    model: Tensor = list(client.run([(kind, k) for k in range(5) for kind in ("train", "task_end")]))[-1]
    return list(Evaluator(dataset, tasks, client.runtime.model).accuracy(model, list(range(5)), after=4).values())


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def test_replay_remembers_classes_that_fine_tuning_forgets(
    handwritten: Dataset, make_client: Callable[..., Any]
) -> None:
    finetune = final_accuracy(handwritten, ClassIncremental, {}, make_client, epochs=4)
    er = final_accuracy(handwritten, ClassIncremental, {"er": ER}, make_client, epochs=4)
    assert mean(finetune) < 0.3
    assert mean(er) > 0.75
    assert mean(er[:-1]) > mean(finetune[:-1]) + 0.5


@pytest.mark.parametrize(
    ("name", "scenario", "training"),
    [
        pytest.param("ewc", DomainPermuted, {"lr": 0.2}, marks=pytest.mark.slow),
        ("lwf", TaskIncremental, {"lr": 0.1, "momentum": 0.9}),
    ],
)
def test_regularisers_remember_what_fine_tuning_forgets(
    handwritten: Dataset, make_client: Callable[..., Any], name: str, scenario: type[Any], training: dict[str, float]
) -> None:
    finetune = final_accuracy(handwritten, scenario, {}, make_client, epochs=8, **training)
    learner = final_accuracy(handwritten, scenario, LEARNERS[name], make_client, epochs=8, **training)
    assert mean(learner[:-1]) > mean(finetune[:-1]) + 0.1
