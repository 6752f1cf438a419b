from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

from fedcl.base.tree import clone, equal, pack, unpack
from fedcl.client.buffer import ReplayBuffer
from fedcl.client.local_data import PartitionedData
from fedcl.client.policies import herd
from fedcl.contracts.learner import Batch, Context, TaskData
from fedcl.data.dataset import ArrayDataset, Dataset, Partition
from fedcl.models.flat import FlatModel
from fedcl.models.networks import MLP
from fedcl.scenario.task import Task


def show(buffer: ReplayBuffer, start: int, stop: int, generator: torch.Generator, task: int = 0) -> None:
    """Samples k = start..stop-1 with x = (k, -k) and y = k."""
    y = torch.arange(start, stop)
    buffer.add(torch.stack([y, -y], dim=1).float(), y, task, generator)


def kept(buffer: ReplayBuffer) -> list[int]:
    return [] if not len(buffer) else sorted(buffer.state()["y"].tolist())


def one_at_a_time(budget: int, n: int, batches: list[int], generator: torch.Generator) -> list[int]:
    """Algorithm R as the paper states it, drawing as many numbers at a time as the batches have late samples."""
    slots: list[int] = []
    k = 0
    for size in batches:
        late = max(0, min(size, k + size - max(budget, k)))
        draws = iter(torch.rand(late, generator=generator, dtype=torch.float64).tolist())
        for _ in range(size):
            if len(slots) < budget:
                slots.append(k)
            else:
                j = int(next(draws) * (k + 1))
                if j < budget:
                    slots[j] = k
            k += 1
    return slots


@settings(max_examples=60, deadline=None)
@given(budget=st.integers(1, 12), batches=st.lists(st.integers(0, 9), min_size=1, max_size=12), seed=st.integers(0, 99))
def test_a_batch_at_a_time_is_one_at_a_time(budget: int, batches: list[int], seed: int) -> None:
    buffer, generator = ReplayBuffer(budget), torch.Generator().manual_seed(seed)
    start = 0
    for size in batches:
        show(buffer, start, start + size, generator)
        start += size
    expected = one_at_a_time(budget, start, batches, torch.Generator().manual_seed(seed))
    assert buffer.seen == start
    assert len(buffer) == len(expected)
    if expected:
        state = buffer.state()
        assert state["y"].tolist() == expected
        assert state["x"].tolist() == [[k, -k] for k in expected]


def uniformity(add: object, *, stream: int = 300, budget: int = 30, trials: int = 200) -> float:
    """p-value of the chi-square test that every sample of the stream is kept equally often."""
    counts = torch.zeros(stream, dtype=torch.float64)
    for trial in range(trials):
        buffer, generator = ReplayBuffer(budget), torch.Generator().manual_seed(trial)
        for start in range(0, stream, 7):
            add(buffer, start, min(start + 7, stream), generator)  # type: ignore[operator]
        counts[kept(buffer)] += 1
    share = budget / stream
    # The counts of a trial add up to the budget, hence stream - 1 degrees of freedom and the factor before them.
    statistic = float(((counts - trials * share) ** 2).sum() / (trials * share * (1 - share)) * (stream - 1) / stream)
    return float(stats.chi2.sf(statistic, stream - 1))


def test_every_sample_is_kept_equally_often() -> None:
    assert 0.01 < uniformity(show) < 0.99


def test_the_uniformity_test_sees_a_bias() -> None:
    def forgetful(buffer: ReplayBuffer, start: int, stop: int, generator: torch.Generator) -> None:
        buffer.seen = min(buffer.seen, 60)  # recent samples are kept too often
        show(buffer, start, stop, generator)

    assert uniformity(forgetful, trials=100) < 1e-6


def test_sampling_is_without_replacement_and_uniform() -> None:
    buffer, generator = ReplayBuffer(8), torch.Generator().manual_seed(0)
    show(buffer, 0, 8, generator)
    counts = torch.zeros(8)
    for _ in range(800):
        y = buffer.sample(3, generator).y
        assert len(set(y.tolist())) == 3
        counts[y] += 1
    assert float(stats.chisquare(counts.numpy()).pvalue) > 0.01
    assert sorted(buffer.sample(99, generator).y.tolist()) == list(range(8))


def test_the_state_carries_everything() -> None:
    straight, generator = ReplayBuffer(5), torch.Generator().manual_seed(1)
    show(straight, 0, 4, generator, task=2)
    state = clone(unpack(*pack(straight.state())))
    carried = ReplayBuffer(5)
    carried.load(clone(state))
    assert equal(carried.state(), state)
    other = torch.Generator().manual_seed(9)
    for start in range(4, 40, 6):
        show(straight, start, start + 6, other.manual_seed(start), task=3)
        show(carried, start, start + 6, other.manual_seed(start), task=3)
    assert equal(carried.state(), straight.state())
    assert straight.state()["seen"] == 40
    assert state["task"].tolist() == [2, 2, 2, 2]


def test_memory_grows_with_what_is_kept(device: torch.device) -> None:
    buffer = ReplayBuffer(1_000_000)
    y = torch.zeros(3, dtype=torch.int64, device=device)
    buffer.add(torch.ones(3, 2, device=device), y, 0, torch.Generator())
    x: Tensor = buffer.state()["x"]
    assert x.untyped_storage().nbytes() == 3 * 2 * 4
    assert x.device.type == device.type
    assert x.is_contiguous()


def test_no_budget_keeps_nothing_and_a_negative_one_is_refused() -> None:
    buffer = ReplayBuffer(0)
    show(buffer, 0, 5, torch.Generator())
    assert (len(buffer), buffer.state()) == (0, {})
    with pytest.raises(ValueError, match="the buffer is empty"):
        buffer.sample(1, torch.Generator())
    with pytest.raises(ValueError, match="budget=-1: must be >= 0"):
        ReplayBuffer(-1)
    with pytest.raises(ValueError, match="policy=newest: must be one of reservoir"):
        ReplayBuffer(1, "newest")  # type: ignore[arg-type]


# -- samples as they are stored ---------------------------------------------------------------------------------------

SHOWN = [None, {"name": "permute", "seed": 3}, {"name": "rotate", "degrees": 33.0}]
TASKS = [Task(k, (0, 1, 2), (0, 1, 2), transform=transform) for k, transform in enumerate(SHOWN)]


@pytest.fixture
def images() -> PartitionedData:
    rng = np.random.default_rng(0)
    half = ArrayDataset(rng.integers(0, 256, (60, 3, 6, 5), np.uint8), np.arange(60) % 3)
    dataset = Dataset(half, half, ("a", "b", "c"), scale=1 / 255, mean=(0.1, 0.2, 0.3), std=(0.21, 0.33, 0.17))
    return PartitionedData(dataset, Partition((np.arange(60),), (np.arange(60),)), ("0",))


def context(data: TaskData, task: Task, *, local_round: int = 0) -> Context:
    model = FlatModel(MLP(input_shape=tuple(data.x.shape[1:]), heads=(3,), hidden=(4,)), device=data.x.device)
    return Context(
        model=model, task=task, data=data, received=model.vector(), epochs=1, batch_size=8, lr=0.1, seed=0, client="0",
        local_round=local_round, is_new_task=True, task_columns={0: (0, 1, 2)}, num_columns=3,
    )  # fmt: skip


def offer_all(buffer: ReplayBuffer, ctx: Context) -> None:
    """The loop's first epoch, as far as the buffer sees it."""
    ctx.order = torch.randperm(len(ctx.data), generator=ctx.rng("batches")).to(ctx.device)
    for start in range(0, len(ctx.data), ctx.batch_size):
        ctx.start = start
        assert ctx.rows is not None
        # what was joined to the batch is none of the stream
        mixed = torch.cat([ctx.data.x[ctx.rows], torch.full_like(ctx.data.x[:2], 7.0)])
        labels = torch.cat([ctx.data.y[ctx.rows], ctx.data.y[:2]])
        buffer.offer(ctx, Batch(mixed, labels, None, fresh=len(ctx.rows)))


def rows(tensor: Tensor) -> set[bytes]:
    return {row.numpy().tobytes() for row in tensor.cpu()}


@pytest.mark.parametrize("policy", ["reservoir", "class_balanced", "herding"])
def test_what_is_replayed_is_what_came_bit_for_bit(images: PartitionedData, device: torch.device, policy: Any) -> None:
    buffer = ReplayBuffer(40, policy)
    originals = {}
    for task in TASKS:
        data = images.train("0", task, device)
        originals[task.id] = rows(data.x)
        ctx = context(data, task, local_round=task.id)
        offer_all(buffer, ctx)
        buffer.finalize(ctx)
        carried = ReplayBuffer(40, policy)  # another local round: only what is stored goes with it
        carried.load(clone(unpack(*pack(buffer.state())), device))
        assert equal(carried.state(), buffer.state())
        for each in (buffer, carried):
            replayed = each.sample(99, torch.Generator().manual_seed(0), data.restore)
            assert len(replayed.y) == len(buffer) == 40
            for x, met in zip(replayed.x, replayed.task.tolist(), strict=True):
                assert rows(x[None]) <= originals[met]
        buffer = carried
    assert set(replayed.task.tolist()) == {0, 1, 2}
    assert buffer.seen == 180
    assert buffer.state()["x"].dtype == torch.uint8


def test_uint8_takes_a_quarter_of_the_memory(images: PartitionedData, device: torch.device) -> None:
    data = images.train("0", TASKS[0], device)
    held = {}
    for name, raw in (("raw", data.raw), ("seen", None)):
        buffer = ReplayBuffer(40)
        buffer.add(data.x, data.y, 0, torch.Generator().manual_seed(0), raw=raw)
        held[name] = buffer.state()
    assert held["raw"]["x"].nbytes * 4 == held["seen"]["x"].nbytes
    assert torch.equal(held["raw"]["y"], held["seen"]["y"])
    carried = ReplayBuffer(40)
    carried.load(held["raw"])
    with pytest.raises(ValueError, match="held raw: `restore` must be given"):
        carried.sample(1, torch.Generator())


def test_a_budget_in_bytes_counts_all_that_is_held(images: PartitionedData, device: torch.device) -> None:
    data = images.train("0", TASKS[0], device)
    logits = torch.zeros(60, 3, device=device)
    each = {"raw": 90 + 16, "seen": 4 * 90 + 16, "with logits": 90 + 16 + 12}
    given: dict[str, dict[str, Any]] = {
        "raw": {"raw": data.raw},
        "seen": {},
        "with logits": {"raw": data.raw, "logits": logits},
    }
    for name, columns in given.items():
        buffer = ReplayBuffer("5KB")
        buffer.add(data.x, data.y, 0, torch.Generator().manual_seed(0), **columns)
        assert len(buffer) == 5000 // each[name]
        assert sum(t.untyped_storage().nbytes() for k, t in buffer.held.items() if k != "shown") <= 5000
    with pytest.raises(ValueError, match=r"budget=50B: must be 0, or >= 106B"):
        ReplayBuffer("50B").add(data.x, data.y, 0, torch.Generator(), raw=data.raw)


# -- policies ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("carry", [False, True])
def test_class_balance_outlasts_a_flood_and_a_move(carry: bool) -> None:
    buffer, generator = ReplayBuffer(12, "class_balanced"), torch.Generator().manual_seed(0)
    y = torch.tensor([0] * 70 + [1] * 3 + [2] * 9 + [0] * 50)
    for start in range(0, len(y), 7):
        part = y[start : start + 7]
        buffer.add(part[:, None].float(), part, 0, generator)
        if carry:
            state = clone(unpack(*pack(buffer.state())))
            buffer = ReplayBuffer(12, "class_balanced")
            buffer.load(state)
    assert torch.bincount(buffer.held["y"]).tolist() in ([5, 3, 4], [4, 3, 5])
    assert torch.equal(buffer.held["x"][:, 0].long(), buffer.held["y"])


def test_herding_chooses_at_the_end_of_a_task_and_keeps_the_dearest(
    images: PartitionedData, device: torch.device
) -> None:
    buffer = ReplayBuffer(12, "herding")
    with pytest.raises(ValueError, match="policy=herding: chooses only at a task"):
        buffer.add(torch.ones(1, 1), torch.zeros(1, dtype=torch.int64), 0, torch.Generator())
    first = context(images.train("0", TASKS[0], device), TASKS[0])
    offer_all(buffer, first)
    assert len(buffer) == 0
    buffer.finalize(first, logits=True)
    features = first.model(first.data.x).features.detach()
    for column in range(3):
        members = torch.nonzero(first.data.y == column).squeeze(1)
        expected = members[herd(features[members], 4)]
        mine = buffer.held["y"] == column
        assert first.data.raw is not None
        assert torch.equal(buffer.held["x"][mine], first.data.raw[expected])
        torch.testing.assert_close(buffer.held["logits"][mine], first.model(first.data.x[expected]).logits)
    before = buffer.held
    buffer.finalize(context(images.train("0", TASKS[1], device), TASKS[1]), logits=True)
    after = buffer.held
    for column in range(3):
        old = (after["y"] == column) & (after["task"] == 0)
        assert torch.equal(after["x"][old], before["x"][before["y"] == column][:2])
        assert int(((after["y"] == column) & (after["task"] == 1)).sum()) == 2


# -- forgetting -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["reservoir", "class_balanced"])
def test_what_is_dropped_is_gone_and_its_room_is_free(policy: Any) -> None:
    buffer, generator = ReplayBuffer(20, policy), torch.Generator().manual_seed(0)
    for task in range(4):
        y = torch.arange(40) % 2 + 2 * (task % 2)
        buffer.add((torch.arange(40) + 100 * task)[:, None].float(), y, task, generator)
    ours = buffer.held["y"] == 1
    assert buffer.drop_where("y", [1, 77]) == int(ours.sum())
    left = len(buffer)
    assert 1 not in buffer.state()["y"]
    assert buffer.state()["x"].untyped_storage().nbytes() == 4 * left  # no copy stays behind
    assert buffer.seen == pytest.approx(160 * left / 20, abs=1)
    assert buffer.drop_where("task", [3]) == left - len(buffer)
    gone = buffer.held["x"][:2].clone()
    assert buffer.drop_samples(gone) == 2
    assert not torch.isin(gone, buffer.held["x"]).any()
    buffer.add(torch.full((30, 1), 7.0), torch.full((30,), 9), 5, generator)
    assert len(buffer) == 20
    assert buffer.drop(torch.ones(20, dtype=torch.bool)) == 20
    assert (len(buffer), buffer.seen, buffer.state()) == (0, 0, {})
    assert buffer.drop_where("y", [1]) == buffer.drop_samples(gone) == 0
