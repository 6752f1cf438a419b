from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from fedcl.client.policies import Budget, ClassTally, check_policy, herd, shares


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (200, Budget(200)),
        (0, Budget(0)),
        ("64KB", Budget(64_000, True)),
        ("1.5MiB", Budget(3 << 19, True)),
        ("80 B", Budget(80, True)),
        ("0KB", Budget(0, True)),
    ],
)
def test_budgets_are_samples_or_bytes(value: int | str, expected: Budget) -> None:
    assert Budget.of(value) == expected


@pytest.mark.parametrize("value", [-1, 2.5, True, None, "200", "64 kb", "-1KB", "KB"])
def test_other_budgets_are_refused(value: object) -> None:
    with pytest.raises(ValueError, match=r"learner\.er\.budget=.*: must be >= 0 samples, as in 200, or bytes, as in"):
        Budget.of(value, "learner.er.budget")  # type: ignore[arg-type]


def test_bytes_hold_whole_samples() -> None:
    assert Budget.of("100B").samples(24) == 4
    assert Budget.of(7).samples(1 << 40) == 7
    assert Budget.of("0B").samples(24) == 0
    with pytest.raises(ValueError, match=r"budget=20B: must be 0, or >= 24B"):
        Budget.of("20B").samples(24)


def test_an_unknown_policy_is_refused() -> None:
    with pytest.raises(ValueError, match="policy=fifo: must be one of reservoir, class_balanced, herding"):
        check_policy("fifo")


def balanced_memory(stream: list[int], budget: int, seed: int) -> list[int]:
    """Positions in the stream that class-balanced sampling ends with."""
    tally, generator = ClassTally(), torch.Generator().manual_seed(seed)
    memory = list(range(min(budget, len(stream))))
    tally.count([stream[k] for k in memory])
    for k in range(budget, len(stream)):
        slot = tally.slots([stream[j] for j in memory], [stream[k]], generator)[0]
        if slot >= 0:
            memory[slot] = k
    return memory


@settings(max_examples=40, deadline=None)
@given(stream=st.lists(st.integers(0, 3), min_size=1, max_size=60), budget=st.integers(1, 12), seed=st.integers(0, 99))
def test_every_class_has_its_share_or_all_there_was(stream: list[int], budget: int, seed: int) -> None:
    kept = Counter(stream[k] for k in balanced_memory(stream, budget, seed))
    came = Counter(stream)
    most = max(kept.values())
    assert sum(kept.values()) == min(budget, len(stream))
    # a class that has less than the largest holds all of it that ever came, but for one sample that ties may cost
    assert all(kept[c] >= min(came[c], most - 1) for c in came)


def test_within_a_class_all_are_kept_equally_often() -> None:
    stream = [0] * 40 + [0, 1] * 30
    counts = torch.zeros(len(stream), dtype=torch.float64)
    trials = 400
    for seed in range(trials):
        counts[balanced_memory(stream, 20, seed)] += 1
    for label in (0, 1):
        mine = counts[[k for k, c in enumerate(stream) if c == label]]
        assert mine.sum() / trials == pytest.approx(10, abs=0.5)
        # drawing without replacement spreads less than the test expects: it can only fail by a bias
        assert stats.chisquare(mine.numpy()).pvalue > 0.01


def test_a_batch_at_a_time_is_one_at_a_time() -> None:
    stream = [0, 0, 1, 0, 2, 0, 1, 3, 0, 0, 2, 3, 1, 1, 0, 0, 2, 3]
    memories = []
    for size in (1, 5, len(stream)):
        tally, held, generator = ClassTally(), [0, 0, 1], torch.Generator().manual_seed(3)
        tally.count(held)
        for start in range(0, len(stream), size):
            part = stream[start : start + size]
            for label, slot in zip(part, tally.slots(held, part, generator), strict=True):
                if slot >= 0:
                    held[slot] = label
        # which of a class's samples goes may differ, not of which class nor how many
        memories.append((tally.seen, tally.full, Counter(held)))
    assert memories[0] == memories[1] == memories[2]
    assert memories[0][0] == Counter([*stream, 0, 0, 1])


# Unit features (1, 0), (0, 1), (0.6, 0.8), mean (8, 9)/15: nearest to it is (0.6, 0.8); then half of (0.6, 0.8) and
# (1, 0), at distance^2 0.111, is nearer than half of (0.6, 0.8) and (0, 1), at 0.144.
def test_herding_worked_by_hand() -> None:
    features = torch.tensor([[2.0, 0.0], [0.0, 5.0], [3.0, 4.0]])
    assert herd(features, 2).tolist() == [2, 0]
    assert herd(features, 9).tolist() == [2, 0, 1]
    assert herd(features[:0], 3).tolist() == []


def test_herding_keeps_the_mean_better_than_chance() -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.nn.functional.normalize(torch.randn(200, 16, generator=generator) + 1, dim=1)
    mean = features.mean(0)
    chosen = (features[herd(features, 10)].mean(0) - mean).norm()
    by_chance = [
        (features[torch.randperm(200, generator=generator)[:10]].mean(0) - mean).norm().item() for _ in range(50)
    ]
    assert chosen < 0.6 * min(by_chance)
    assert torch.equal(herd(features, 4), herd(features, 10)[:4])


@pytest.mark.parametrize(
    ("sizes", "capacity", "expected"),
    [([5, 5], 4, [2, 2]), ([5, 5, 5], 7, [3, 2, 2]), ([1, 9, 9], 9, [1, 4, 4]), ([2, 3], 99, [2, 3]), ([], 3, [])],
)
def test_shares_are_equal_as_far_as_they_can_be(sizes: list[int], capacity: int, expected: list[int]) -> None:
    assert shares(sizes, capacity) == expected
