from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedcl.evaluation.predictions import (
    accuracy,
    activation_distance,
    allow,
    backdoor_success,
    entropies,
    kl_divergence,
    losses,
    margins,
    predict,
    zrf,
)
from fedcl.models.flat import FlatModel
from fedcl.models.networks import MLP, build_model

INF = float("inf")
# softmax rows (1/2, 1/2, 0) by exclusion, (1/4, 3/4, 0), (0.1, 0.2, 0.7)
P = torch.tensor([[0.0, 0.0, -INF], [0.0, math.log(3), -INF], [math.log(0.1), math.log(0.2), math.log(0.7)]])
Q = torch.tensor([[0.0, math.log(3), -INF], [0.0, 0.0, -INF], [math.log(0.1), math.log(0.2), math.log(0.7)]])


def log(*shares: float) -> Tensor:
    return torch.tensor([shares], dtype=torch.float64).log()


def seeded(seed: int, *shape: int) -> Tensor:
    return 4 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_accuracy_and_what_a_diverged_model_gets() -> None:
    assert accuracy(P, torch.tensor([0, 0, 2])) == pytest.approx(2 / 3)
    assert math.isnan(accuracy(torch.empty(0, 3), torch.empty(0, dtype=torch.long)))
    assert math.isnan(accuracy(torch.full((4, 3), math.nan), torch.zeros(4, dtype=torch.long)))
    with pytest.raises(ValueError, match=r"targets of shape \(2,\)"):
        accuracy(P, torch.tensor([0, 1]))


def test_entropy_loss_and_margin_by_hand() -> None:
    expected = [math.log(2), -(0.25 * math.log(0.25) + 0.75 * math.log(0.75))]
    torch.testing.assert_close(entropies(P)[:2], torch.tensor(expected, dtype=torch.float64))
    targets = torch.tensor([0, 1, 0])
    torch.testing.assert_close(losses(P, targets), -torch.tensor([0.5, 0.75, 0.1]).double().log())
    # ln p / (1 - p)
    torch.testing.assert_close(margins(P, targets), torch.tensor([0.0, math.log(3), math.log(1 / 9)]).double())


def test_margins_and_losses_where_the_target_is_excluded_or_alone() -> None:
    logits = torch.tensor([[0.0, -INF], [0.0, -INF]])
    assert margins(logits, torch.tensor([0, 1])).tolist() == [100.0, -100.0]
    assert losses(logits, torch.tensor([0, 1])).tolist() == [0.0, INF]


def test_kl_divergence_by_hand_in_both_directions() -> None:
    forth = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    back = 0.25 * math.log(0.25 / 0.5) + 0.75 * math.log(0.75 / 0.5)
    assert kl_divergence(P[:1], Q[:1]) == pytest.approx(forth)
    assert kl_divergence(P[1:2], Q[1:2]) == pytest.approx(back)
    assert kl_divergence(P, Q) == pytest.approx((forth + back) / 3)


def test_a_column_that_only_one_model_excludes_is_infinitely_far() -> None:
    open_, closed = torch.zeros(1, 2), torch.tensor([[0.0, -INF]])
    assert kl_divergence(open_, closed) == INF
    assert kl_divergence(closed, open_) == pytest.approx(math.log(2))


def test_activation_distance_by_hand() -> None:
    assert activation_distance(P, Q) == pytest.approx(2 * math.sqrt(2) * 0.25 / 3)
    opposite = torch.tensor([[200.0, 0.0]]), torch.tensor([[0.0, 200.0]])
    assert activation_distance(*opposite) == pytest.approx(math.sqrt(2))


def test_zrf_by_hand_on_both_scales() -> None:
    p, q, m = (0.5, 0.5), (0.25, 0.75), (0.375, 0.625)
    js = sum(0.5 * a * math.log(a / c) + 0.5 * b * math.log(b / c) for a, b, c in zip(p, q, m, strict=True))
    assert zrf(log(*p), log(*q)) == pytest.approx(1 - js / math.log(2))
    legacy = sum(0.5 * c * (math.log(c / a) + math.log(c / b)) for a, b, c in zip(p, q, m, strict=True))
    assert zrf(log(*p), log(*q), "legacy") == pytest.approx(1 - legacy / 2)
    with pytest.raises(ValueError, match="normalised, legacy"):
        zrf(P, Q, "nats")  # type: ignore[arg-type]


def test_legacy_zrf_is_what_torch_computes_with_its_default_reduction() -> None:
    a, b = seeded(0, 7, 5).double(), seeded(1, 7, 5).double()
    p, q = a.softmax(1), b.softmax(1)
    with pytest.warns(UserWarning, match="reduction"):
        js = sum(0.5 * torch.nn.functional.kl_div(one.log(), (p + q) / 2) for one in (p, q))
    assert zrf(a, b, "legacy") == pytest.approx(1 - float(js))


def test_legacy_zrf_nears_one_with_more_classes_where_the_normalised_does_not() -> None:
    few = torch.tensor([[50.0, 0.0]]), torch.tensor([[0.0, 50.0]])
    many = tuple(torch.cat([logits, torch.full((1, 98), -INF)], dim=1) for logits in few)
    assert zrf(*few) == pytest.approx(zrf(many[0], many[1])) == pytest.approx(0.0, abs=1e-9)
    assert 1 - zrf(many[0], many[1], "legacy") == pytest.approx((1 - zrf(*few, "legacy")) / 50)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 6), st.integers(1, 6))
def test_bounds_and_equal_models(seed: int, samples: int, columns: int) -> None:
    a, b = seeded(seed, samples, columns) * 5, seeded(seed + 1, samples, columns)
    assert -1e-12 <= zrf(a, b) <= 1 + 1e-12
    assert zrf(a, b) == pytest.approx(zrf(b, a))
    assert kl_divergence(a, b) >= -1e-12
    assert activation_distance(a, b) <= math.sqrt(2) + 1e-12
    # adding a constant to all logits of a sample changes no prediction
    shifted = a.double() + 7
    assert kl_divergence(a.double(), shifted) == pytest.approx(0.0, abs=1e-10)
    assert activation_distance(a, a) == 0.0
    assert zrf(a, a) == pytest.approx(1.0)


def test_nothing_gives_nan() -> None:
    empty = torch.empty(0, 3)
    assert all(math.isnan(f(empty, empty)) for f in (kl_divergence, activation_distance, zrf))
    assert math.isnan(kl_divergence(torch.full((1, 2), math.nan), torch.zeros(1, 2)))
    with pytest.raises(ValueError, match="same"):
        kl_divergence(P, Q[:2])


def test_backdoor_success_leaves_out_the_target_class_itself() -> None:
    logits = torch.eye(3)[[2, 2, 0, 2]]
    assert backdoor_success(logits, torch.tensor([0, 1, 1, 2]), 2) == pytest.approx(2 / 3)
    assert math.isnan(backdoor_success(logits, torch.full((4,), 2), 2))


def test_predict_runs_in_batches_and_excludes_columns() -> None:
    model = FlatModel(build_model(lambda: MLP(input_shape=(4,), heads=[3], hidden=[5]), seed=0))
    vector = model.vector() * 2
    x = seeded(2, 7, 4)
    whole, parts = predict(model, vector, x), predict(model, vector, x, batch_size=3, columns=[0, 2])
    torch.testing.assert_close(whole.features, parts.features)
    torch.testing.assert_close(whole.logits[:, [0, 2]], parts.logits[:, [0, 2]])
    assert parts.logits[:, 1].tolist() == [-INF] * 7
    assert not whole.logits.requires_grad
    assert predict(model, vector, x[:0]).logits.shape == (0, 3)
    assert allow(whole.logits, None) is whole.logits
