from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from clients.learners.agem import AGEM
from clients.learners.der import DER
from clients.learners.er import ER
from clients.learners.er_ace import ERACE
from clients.learners.gdumb import GDumb
from clients.learners.replay import masks_by_task
from clients.learners.uer import UER
from fedcl.base.tree import equal
from fedcl.contracts.learner import Batch, Context, Plugin, TaskData
from fedcl.data.dataset import ArrayDataset, Dataset
from fedcl.models.flat import FlatModel
from fedcl.models.networks import MLP
from fedcl.scenario.domains import DomainPermuted, DomainRotated
from fedcl.scenario.streams import ClassIncremental, TaskIncremental
from fedcl.scenario.task import Stream, Task
from tests.sampling import sampled


def context(
    device: torch.device,
    task: Task,
    met: dict[int, tuple[int, ...]],
    *,
    local_round: int = 0,
    is_new: bool = True,
    values: range = range(12),
) -> Context:
    x = torch.tensor([[float(value)] for value in values], device=device)
    return Context(
        model=FlatModel(MLP(input_shape=(1,), heads=(4,), hidden=()), device=device), task=task,
        data=TaskData(x, torch.full((len(x),), task.columns[0], device=device)), received=torch.zeros(8), epochs=2,
        batch_size=3, lr=0.1, seed=0, client="0", local_round=local_round, is_new_task=is_new, task_columns=met,
        num_columns=4,
    )  # fmt: skip


def steps(er: ER, ctx: Context) -> list[Batch]:
    """Play the visit's batches in order."""
    er.before_round(ctx)
    batches = []
    for epoch in range(ctx.epochs):
        ctx.epoch = epoch
        for start in range(0, len(ctx.data), ctx.batch_size):
            part = slice(start, start + ctx.batch_size)
            batches.append(er.before_step(ctx, Batch(ctx.data.x[part], ctx.data.y[part], ctx.mask)))
    return batches


TASK = [Task(0, (0, 1), (0, 1), mask=(0, 1)), Task(1, (2, 3), (2, 3), mask=(2, 3))]
SEEN = Task(1, (2, 3), (2, 3), mask=(0, 1, 2, 3))
MET = {0: (0, 1), 1: (2, 3)}


def test_each_sample_of_the_stream_is_offered_once(device: torch.device) -> None:
    er = ER(budget=100)
    steps(er, context(device, TASK[0], {0: (0, 1)}))
    assert er.state()["seen"] == 12
    steps(er, context(device, TASK[0], {0: (0, 1)}, local_round=1, is_new=False))
    assert er.state()["seen"] == 12
    steps(er, context(device, TASK[1], MET, local_round=2, values=range(20, 27)))
    state = er.state()
    assert state["seen"] == 19
    assert sorted(state["x"].flatten().tolist()) == [*range(12), *range(20, 27)]
    assert state["task"].tolist() == [0] * 12 + [1] * 7
    assert state["y"].tolist() == [0] * 12 + [2] * 7


def test_replay_comes_from_before_the_batch(device: torch.device) -> None:
    er = ER(budget=100, replay_size=4)
    batches = steps(er, context(device, TASK[0], {0: (0, 1)}))
    assert [len(batch.y) for batch in batches] == [3, 6, 7, 7, 7, 7, 7, 7]
    for step, batch in enumerate(batches[:4]):
        new, old = batch.x.flatten().tolist()[:3], batch.x.flatten().tolist()[3:]
        assert new == [3 * step, 3 * step + 1, 3 * step + 2]
        assert set(old) <= set(range(3 * step))
        assert len(set(old)) == len(old)


def test_without_a_size_as_many_are_replayed_as_come_in(device: torch.device) -> None:
    batches = steps(ER(budget=100), context(device, TASK[0], {0: (0, 1)}))
    assert [len(batch.y) for batch in batches[:3]] == [3, 6, 6]


def test_replayed_samples_of_other_tasks_choose_among_their_own_columns(device: torch.device) -> None:
    er = ER(budget=100)
    first = steps(er, context(device, TASK[0], {0: (0, 1)}))
    assert all(batch.mask is not None and batch.mask.ndim == 1 for batch in first)  # one mask serves all
    for batch in steps(er, context(device, TASK[1], MET, local_round=1)):
        assert batch.mask is not None
        assert batch.mask.shape == (len(batch.y), 4)
        assert batch.mask.gather(1, batch.y[:, None]).all()
        for y, row in zip(batch.y.tolist(), batch.mask.tolist(), strict=True):
            assert row == ([True, True, False, False] if y < 2 else [False, False, True, True])


@pytest.mark.parametrize(
    "task", [SEEN, Task(1, (2, 3), (2, 3)), Task(1, (2, 3), (2, 3), mask=(1, 2, 3))], ids=["seen", "all", "partly"]
)
def test_masks_of_earlier_tasks(device: torch.device, task: Task) -> None:
    ctx = context(device, task, MET)
    masks = masks_by_task(ctx)
    if task.mask != (1, 2, 3):
        assert masks is None
    else:
        assert masks is not None
        assert masks.tolist() == [[True, True, False, False], [False, True, True, True]]


def test_with_a_growing_mask_replay_shares_it(device: torch.device) -> None:
    er = ER(budget=100)
    steps(er, context(device, TASK[0], {0: (0, 1)}))
    narrow = Task(1, (2,), (2,), mask=(0, 1, 2))
    for batch in steps(er, context(device, narrow, {0: (0, 1), 1: (2,)}, local_round=1)):
        assert batch.mask is not None
        assert batch.mask.tolist() == [True, True, True, False]


def test_the_draws_belong_to_the_visit(device: torch.device) -> None:
    def replayed(visit: int) -> list[float]:
        batches = steps(ER(budget=6), context(device, TASK[0], {0: (0, 1)}, local_round=visit))
        return [value for batch in batches for value in batch.x[3:, 0].tolist()]

    assert replayed(0) == replayed(0)
    assert replayed(0) != replayed(1)


# -- with the whole client --------------------------------------------------------------------------------------------

SCRIPT = [(kind, task) for task in range(3) for kind in ("train", "train", "task_end")]
REPLAY: dict[str, Callable[..., Plugin]] = {
    "er": ER, "er_ace": ERACE, "uer": UER, "agem": AGEM, "der": partial(DER, beta=0.5),
}  # fmt: skip


@pytest.fixture
def pictures() -> Dataset:
    """Six classes of 4x4 images, stored as uint8."""
    rng = np.random.default_rng(3)
    patterns, halves = rng.random((6, 1, 4, 4)), []
    for each in (14, 10):
        y = np.repeat(np.arange(6), each)
        x = 255 * np.clip(patterns[y] + 0.15 * rng.normal(size=(len(y), 1, 4, 4)), 0, 1)
        halves.append(ArrayDataset(x.astype(np.uint8), y.astype(np.int64)))
    return Dataset(halves[0], halves[1], tuple("abcdef"), scale=1 / 255, mean=(0.5,), std=(0.3,))


def stream(kind: type[Any]) -> Stream:
    made: Stream = kind(num_classes=6, input_shape=(1, 4, 4), seed=0, num_tasks=3)
    return made


def as_the_model_sees_them(dataset: Dataset) -> Dataset:
    """The same inputs, of which no stored form is left."""
    train, test = (ArrayDataset(dataset.normalise(half.x), half.y) for half in (dataset.train, dataset.test))
    return Dataset(train, test, dataset.classes)


@pytest.mark.parametrize(
    ("name", "kind"),
    sampled([*REPLAY, "gdumb"], [ClassIncremental, DomainPermuted, TaskIncremental, DomainRotated], every=2),
)
def test_from_bytes_or_from_floats_the_model_is_the_same_bit_for_bit(
    pictures: Dataset, make_client: Callable[..., Any], name: str, kind: type[Any]
) -> None:
    build = partial((REPLAY | {"gdumb": GDumb})[name], budget=9)
    stored = make_client(pictures, stream(kind), {name: build})
    seen = make_client(as_the_model_sees_them(pictures), stream(kind), {name: build})
    for a, b in zip(stored.run(SCRIPT, rebuild=True), seen.run(SCRIPT), strict=True):
        assert torch.equal(a, b)
    small, large = stored.state[name]["x"], seen.state[name]["x"]
    assert (small.dtype, large.dtype) == (torch.uint8, torch.float32)
    assert small.shape == large.shape


@pytest.mark.parametrize(
    ("name", "policy", "kind"),
    sampled(REPLAY, ["class_balanced", "herding"], [ClassIncremental, TaskIncremental, DomainPermuted], every=3),
)
def test_every_policy_carries_its_state(
    pictures: Dataset, make_client: Callable[..., Any], name: str, policy: str, kind: type[Any]
) -> None:
    build = {name: partial(REPLAY[name], budget="300B", policy=policy)}
    straight, carried = (make_client(pictures, stream(kind), build) for _ in range(2))
    for a, b in zip(straight.run(SCRIPT), carried.run(SCRIPT, rebuild=True), strict=True):
        assert torch.equal(a, b)
    assert equal(straight.state, carried.state)
    state = straight.state[name]
    assert len(state["y"]) == 300 // (16 + 16 + (24 if name == "der" else 0))
    counts = torch.bincount(state["y"])
    assert counts.max() - counts.min() <= 1


def test_a_bad_budget_or_policy_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"learner\.er_ace\.budget=-1: must be >= 0 samples"):
        ERACE(budget=-1)
    with pytest.raises(ValueError, match=r"learner\.derpp\.budget=many"):
        DER(budget="many", beta=0.5)
    with pytest.raises(ValueError, match="policy=herding: needs refresh=true"):
        DER(policy="herding", refresh=False)
