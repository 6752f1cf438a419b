from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, RecordDict
from flwr.serverapp.strategy.multikrum import select_multikrum
from torch import Tensor

from fedcl.base.randomness import torch_generator
from fedcl.contracts.strategy import GLOBAL, Update
from fedcl.models.flat import Spec, TensorSpec
from fedcl.server.strategy import Pipeline
from strategies.collaboration.robust import (
    GeometricMedian,
    Krum,
    Median,
    Robust,
    TrimmedMean,
    geometric_median,
    krum_scores,
    median,
    trimmed_mean,
)

Rule = Callable[[Tensor], Tensor]
RULES: list[Callable[[], Robust]] = [Median, TrimmedMean, Krum, GeometricMedian]


def rows(*values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


@dataclass
class View:
    spec: Spec
    global_model: Tensor

    def model_of(self, client: str) -> Tensor:
        return self.global_model


def shared(size: int) -> Spec:
    return Spec([TensorSpec("w", (size,), 0, size, "parameter", None)])


def update(client: int, base: Tensor, model: Tensor, head: int = 0, n: int = 10, weight: float | None = None) -> Update:
    return Update(str(client), 0, GLOBAL, 0, base, model, n, float(n) if weight is None else weight, 0, head)


def aggregate(rule: Robust, view: View, updates: list[Update]) -> Tensor:
    pipeline = Pipeline(collaboration=rule)
    pipeline.setup(view.spec)
    return pipeline.aggregate(updates, view)[GLOBAL]  # type: ignore[arg-type]


# -- rules, by hand -------------------------------------------------------------------------------------------------


def test_median_by_hand() -> None:
    assert median(rows([1, 9], [5, -1], [3, 0])).tolist() == [3, 0]
    assert median(rows([1, 9], [5, -1], [3, 0], [100, 4])).tolist() == [4, 2]


def test_trimmed_mean_by_hand() -> None:
    deltas = rows([1], [2], [3], [100], [-50])
    assert trimmed_mean(deltas, 0.2).tolist() == [2]
    assert trimmed_mean(deltas, 0.19).tolist() == [11.2]  # int(0.95) = 0: nothing is cut
    assert trimmed_mean(deltas, 0.4).tolist() == [2]


def test_krum_scores_by_hand() -> None:
    # on a line at 0, 1, 3, 10, 11 with one attacker: 5 - 1 - 2 = 2 nearest
    assert krum_scores(rows([0], [1], [3], [10], [11]), 1).tolist() == [1 + 9, 1 + 4, 4 + 9, 1 + 49, 1 + 64]
    assert krum_scores(rows([2], [7]), 3).tolist() == [25, 25]  # at least one neighbour
    assert krum_scores(rows([2]), 1).tolist() == [0]  # there is none


def test_geometric_median_by_hand() -> None:
    # the Fermat point of a right triangle's corner region: with an angle above 120 degrees it is that corner
    wide = rows([0, 0], [10, 1], [-10, 1])
    centre, weights = geometric_median(wide, torch.ones(3, dtype=torch.float64), 1e-9, 3000)
    torch.testing.assert_close(centre, rows([0, 0])[0], rtol=0, atol=1e-2)
    # an equilateral triangle: its centre
    corners = rows([1, 0], [-0.5, 3**0.5 / 2], [-0.5, -(3**0.5) / 2])
    centre, weights = geometric_median(corners, torch.ones(3, dtype=torch.float64), 1e-9, 50)
    torch.testing.assert_close(centre, rows([0, 0])[0])
    torch.testing.assert_close(weights, torch.full((3,), 1 / 3, dtype=torch.float64))


def test_one_weiszfeld_step_by_hand() -> None:
    # from the mean 3: distances 3, 2, 5 -> beta 1/3, 1/2, 1/5
    centre, _ = geometric_median(rows([0], [1], [8]), torch.ones(3, dtype=torch.float64), 1e-9, 1)
    assert float(centre) == pytest.approx((1 / 2 + 8 / 5) / (1 / 3 + 1 / 2 + 1 / 5))


def test_more_iterations_come_nearer() -> None:
    deltas = torch.randn(9, 5, generator=torch_generator("rfa"), dtype=torch.float64)
    deltas[0] *= 50

    def cost(iterations: int) -> float:
        centre, _ = geometric_median(deltas, torch.ones(9, dtype=torch.float64), 1e-6, iterations)
        return float((deltas - centre).norm(dim=1).sum())

    costs = [cost(n) for n in (0, 1, 3, 10, 50)]
    assert costs == sorted(costs, reverse=True)
    assert costs[0] > 1.5 * costs[-1]


@pytest.mark.parametrize(("attackers", "keep"), [(0, 1), (1, 1), (2, 1), (2, 3), (3, 7)])
@pytest.mark.parametrize("seed", range(3))
def test_krum_selects_as_flower(attackers: int, keep: int, seed: int) -> None:
    vectors = torch.randn(9, 6, generator=torch_generator("krum", seed), dtype=torch.float64)
    contents = [RecordDict({"arrays": ArrayRecord([vector.numpy()])}) for vector in vectors]
    chosen = select_multikrum(contents, attackers, keep)
    theirs = np.mean([content["arrays"].to_numpy_ndarrays()[0] for content in chosen], axis=0)  # type: ignore[union-attr]
    base = torch.zeros(6)
    updates = [update(i, base, vector.float()) for i, vector in enumerate(vectors)]
    ours = aggregate(Krum(attackers=attackers, keep=keep), View(shared(6), base), updates)
    torch.testing.assert_close(ours, torch.from_numpy(theirs).float())


# -- what holds for all ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", RULES)
def test_a_shift_and_the_order_of_clients_change_nothing(make: Callable[[], Robust]) -> None:
    deltas = torch.randn(7, 5, generator=torch_generator("shift"))
    zero, far = torch.zeros(5), torch.full((5,), 4.0)
    here = aggregate(make(), View(shared(5), zero), [update(i, zero, d) for i, d in enumerate(deltas)])
    there = aggregate(make(), View(shared(5), far), [update(i, far, far + d) for i, d in enumerate(deltas)])
    turned = aggregate(make(), View(shared(5), zero), [update(i, zero, d) for i, d in enumerate(deltas.flip(0))])
    torch.testing.assert_close(there - far, here, rtol=0, atol=2e-6)
    torch.testing.assert_close(turned, here)


@pytest.mark.parametrize("make", RULES)
def test_equal_updates_are_the_outcome(make: Callable[[], Robust]) -> None:
    base, model = torch.zeros(3), torch.tensor([1.0, -2.0, 0.5])
    torch.testing.assert_close(
        aggregate(make(), View(shared(3), base), [update(i, base, model) for i in range(5)]), model
    )


@pytest.mark.parametrize("make", RULES)
def test_a_stale_update_counts_by_its_change(make: Callable[[], Robust]) -> None:
    now, before = torch.full((2,), 10.0), torch.zeros(2)
    updates = [update(0, before, torch.ones(2)), update(1, now, now + 1), update(2, now, now + 1)]
    torch.testing.assert_close(aggregate(make(), View(shared(2), now), updates), torch.full((2,), 11.0))


@pytest.mark.parametrize("make", RULES)
def test_what_a_client_says_of_its_samples_does_not_count(make: Callable[[], Robust]) -> None:
    deltas, zero = torch.randn(5, 4, generator=torch_generator("samples")), torch.zeros(4)
    modest = aggregate(make(), View(shared(4), zero), [update(i, zero, d) for i, d in enumerate(deltas)])
    loud = [update(i, zero, d, n=10 if i else 10**9) for i, d in enumerate(deltas)]
    assert torch.equal(aggregate(make(), View(shared(4), zero), loud), modest)


def test_the_geometric_median_takes_weights_when_told() -> None:
    zero = torch.zeros(1)
    updates = [update(i, zero, torch.tensor([v]), n=n) for i, (v, n) in enumerate([(0.0, 1), (1.0, 1), (5.0, 8)])]
    rule = GeometricMedian(weighting="num_examples", iterations=200)
    torch.testing.assert_close(aggregate(rule, View(shared(1), zero), updates), torch.tensor([5.0]))
    uniform = aggregate(GeometricMedian(iterations=200), View(shared(1), zero), updates)
    torch.testing.assert_close(uniform, torch.tensor([1.0]), rtol=0, atol=1e-3)


@pytest.mark.parametrize("make", RULES)
def test_a_head_is_moved_by_those_who_trained_it(make: Callable[[], Robust]) -> None:
    spec = Spec(
        [
            TensorSpec("body", (1,), 0, 1, "parameter", None),
            TensorSpec("heads.0.w", (1,), 1, 2, "parameter", 0),
            TensorSpec("heads.1.w", (1,), 2, 3, "parameter", 1),
            TensorSpec("heads.2.w", (1,), 3, 4, "parameter", 2),
        ]
    )
    zero = torch.zeros(4)
    moved = torch.tensor([1.0, 2.0, 7.0, 7.0])  # 7: decay of heads that were not trained
    other = torch.tensor([1.0, 7.0, 3.0, 7.0])
    updates = [update(i, zero, other if i > 2 else moved, head=int(i > 2)) for i in range(6)]
    result = aggregate(make(), View(spec, zero), updates)
    assert result[0] == 1
    assert result[3] == 0
    if make is Krum:
        assert result[1:3].tolist() == [2, 0]  # one update is chosen, and it trained head 0
    else:
        torch.testing.assert_close(result[1:3], torch.tensor([2.0, 3.0]))


# -- attacks --------------------------------------------------------------------------------------------------------


def honest(count: int) -> Tensor:
    """Return updates around one direction of length 1, (count, 50)."""
    noise = torch.randn(count, 50, generator=torch_generator("honest"), dtype=torch.float64) / 50**0.5
    return torch.ones(50, dtype=torch.float64) / 50**0.5 + 0.5 * noise


def sign_flip(good: Tensor, bad: int) -> Tensor:
    """Ten times the honest mean, backwards."""
    return -10 * good.mean(0).expand(bad, -1)


def inner_product(good: Tensor, bad: int) -> Tensor:
    """IPM with epsilon 1.1 (Xie et al., UAI 2020): a small step backwards."""
    return -1.1 * good.mean(0).expand(bad, -1)


def little_is_enough(good: Tensor, bad: int) -> Tensor:
    """ALIE (Baruch et al., NeurIPS 2019) with z = 1.5: off the mean, yet within what honest updates spread."""
    return (good.mean(0) - 1.5 * good.std(0)).expand(bad, -1)


ATTACKS = {"sign_flip": sign_flip, "ipm": inner_product, "alie": little_is_enough}
DEFENCES: dict[str, Rule] = {
    "mean": lambda d: d.mean(0),
    "median": median,
    "trimmed_mean": lambda d: trimmed_mean(d, 0.3),
    "krum": lambda d: d[krum_scores(d, 6).argmin()],
    "multi_krum": lambda d: d[krum_scores(d, 6).argsort(stable=True)[:8]].mean(0),
    "geometric_median": lambda d: geometric_median(d, torch.ones(len(d), dtype=torch.float64), 1e-6, 10)[0],
}


def harm(defence: str, attack: str, bad: int) -> float:
    """Return how far the outcome is from the honest mean, as a share of its length; 20 clients."""
    good = honest(20 - bad)
    stacked = torch.cat([good, ATTACKS[attack](good, bad)])
    return float((DEFENCES[defence](stacked) - good.mean(0)).norm() / good.mean(0).norm())


# Of 20 clients; an outcome survives when it is within half the honest mean's length of the honest mean.
FALLS = {
    ("mean", "sign_flip", 2),
    ("mean", "sign_flip", 4),
    ("mean", "sign_flip", 6),
    ("mean", "ipm", 6),
    ("krum", "alie", 6),
    ("multi_krum", "alie", 6),
}


@pytest.mark.parametrize("bad", [2, 4, 6])
@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("defence", DEFENCES)
def test_which_attacks_are_survived(defence: str, attack: str, bad: int) -> None:
    assert (harm(defence, attack, bad) > 0.5) == ((defence, attack, bad) in FALLS)


@pytest.mark.parametrize("attack", ["sign_flip", "ipm"])
def test_multi_krum_keeps_honest_updates_alone(attack: str) -> None:
    good = honest(14)
    kept = krum_scores(torch.cat([good, ATTACKS[attack](good, 6)]), 6).argsort(stable=True)[:8]
    assert int(kept.max()) < 14


def test_alie_at_thirty_percent_is_what_krum_chooses() -> None:
    good = honest(14)
    assert int(krum_scores(torch.cat([good, little_is_enough(good, 6)]), 6).argmin()) >= 14
