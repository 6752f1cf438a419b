"""What holds for every learner: off means naive, state carries everything, and it helps where it should."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from clients.learners.er import ER
from clients.learners.ewc import EWC
from clients.learners.lwf import LwF
from fedcl.client.plugin import Plugin
from fedcl.data.dataset import Dataset
from fedcl.data.sources import digits
from fedcl.evaluation.evaluator import Evaluator
from fedcl.scenario.streams import ClassIncremental, DomainPermuted, TaskIncremental
from fedcl.scenario.task import Stream
from fedcl.tree import equal

Plugins = dict[str, Callable[[], Plugin]]
SCRIPT = [(kind, task) for task in range(3) for kind in ("train", "train", "task_end")]
LEARNERS: dict[str, Plugins] = {
    "ewc": {"ewc": EWC},
    "ewc_separate": {"ewc": partial(EWC, mode="separate", fisher="per_batch", half=False)},
    "lwf": {"lwf": LwF},
    "er": {"er": partial(ER, budget=9)},
    "all": {"er": partial(ER, budget=9), "lwf": LwF, "ewc": EWC},
}


def stream(kind: type[Any], dataset: Dataset, tasks: int = 3, **extra: Any) -> Stream:
    made: Stream = kind(
        num_classes=dataset.num_classes, input_shape=dataset.input_shape, seed=0, num_tasks=tasks, **extra
    )
    return made


@pytest.mark.parametrize("scenario", [ClassIncremental, TaskIncremental, DomainPermuted])
@pytest.mark.parametrize(
    "off",
    [{"ewc": partial(EWC, weight=0.0)}, {"lwf": partial(LwF, weight=0.0)}, {"er": partial(ER, budget=0)}],
    ids=["ewc", "lwf", "er"],
)
def test_turned_off_it_is_fine_tuning_bit_for_bit(
    blobs: Dataset, make_client: Callable[..., Any], scenario: type[Any], off: Plugins
) -> None:
    naive = list(make_client(blobs, stream(scenario, blobs), {}).play(SCRIPT))
    same = list(make_client(blobs, stream(scenario, blobs), off).play(SCRIPT))
    assert all(torch.equal(a, b) for a, b in zip(naive, same, strict=True))
    assert all(not torch.equal(a, b) for a, b in pairwise(naive[:2]))


@pytest.mark.parametrize("scenario", [ClassIncremental, TaskIncremental, DomainPermuted])
@pytest.mark.parametrize("name", LEARNERS)
def test_turned_on_it_is_not(blobs: Dataset, make_client: Callable[..., Any], scenario: type[Any], name: str) -> None:
    naive = list(make_client(blobs, stream(scenario, blobs), {}).play(SCRIPT))
    other = list(make_client(blobs, stream(scenario, blobs), LEARNERS[name]).play(SCRIPT))
    assert not torch.equal(naive[-1], other[-1])
    # without replay nothing may change before the first task has ended
    assert torch.equal(naive[1], other[1]) == ("er" not in LEARNERS[name])


@pytest.mark.parametrize("name", LEARNERS)
def test_state_carried_over_continues_as_if_uninterrupted(
    blobs: Dataset, make_client: Callable[..., Any], name: str
) -> None:
    straight = make_client(blobs, stream(TaskIncremental, blobs), LEARNERS[name])
    carried = make_client(blobs, stream(TaskIncremental, blobs), LEARNERS[name])
    for a, b in zip(straight.play(SCRIPT), carried.play(SCRIPT, rebuild=True), strict=True):
        assert torch.equal(a, b)
    assert equal(straight.state, carried.state)
    assert set(straight.state) == set(LEARNERS[name])
    assert all(state for state in straight.state.values())


def test_the_order_of_listing_does_not_matter(blobs: Dataset, make_client: Callable[..., Any]) -> None:
    forward = list(make_client(blobs, stream(ClassIncremental, blobs), LEARNERS["all"]).play(SCRIPT))
    # of one phase are only EWC and LwF: a sum of two terms does not depend on their order by more than rounding
    backward = list(
        make_client(blobs, stream(ClassIncremental, blobs), dict(reversed(LEARNERS["all"].items()))).play(SCRIPT)
    )
    torch.testing.assert_close(forward[-1], backward[-1], rtol=1e-3, atol=1e-4)


@pytest.fixture(scope="module")
def handwritten() -> Dataset:
    return digits()


def final_accuracy(
    dataset: Dataset, kind: type[Any], plugins: Plugins, make_client: Callable[..., Any], **training: float
) -> list[float]:
    """Test accuracy on each of five tasks after the last."""
    tasks = stream(kind, dataset, 5)
    client = make_client(dataset, tasks, plugins, hidden=(32,), batch_size=20, **training)
    model: Tensor = list(client.play([(kind, k) for k in range(5) for kind in ("train", "task_end")]))[-1]
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
    [("ewc", DomainPermuted, {"lr": 0.2}), ("lwf", TaskIncremental, {"lr": 0.1, "momentum": 0.9})],
)
def test_regularisers_remember_what_fine_tuning_forgets(
    handwritten: Dataset, make_client: Callable[..., Any], name: str, scenario: type[Any], training: dict[str, float]
) -> None:
    finetune = final_accuracy(handwritten, scenario, {}, make_client, epochs=8, **training)
    learner = final_accuracy(handwritten, scenario, LEARNERS[name], make_client, epochs=8, **training)
    assert mean(learner[:-1]) > mean(finetune[:-1]) + 0.1
