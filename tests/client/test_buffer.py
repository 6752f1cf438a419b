from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

from fedcl.client.buffer import ReplayBuffer
from fedcl.tree import clone, equal, pack, unpack


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
    with pytest.raises(ValueError, match="empty buffer"):
        buffer.sample(1, torch.Generator())
    with pytest.raises(ValueError, match="budget=-1: must be >= 0"):
        ReplayBuffer(-1)
