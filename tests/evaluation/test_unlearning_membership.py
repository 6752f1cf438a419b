from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score, roc_curve
from torch import Tensor

from fedcl.evaluation.klom import klom
from fedcl.evaluation.membership import (
    auc,
    entropy_attack,
    fit_logistic,
    likelihood_ratio_attack,
    loss_auc,
    priv_leak,
    tpr_at_fpr,
)
from fedcl.evaluation.predictions import entropies


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("case", ["overlapping", "separable", "unbalanced", "far", "tiny scale"])
def test_logistic_regression_is_scikit_learns(case: str) -> None:
    positive, negative = {
        "overlapping": (normal(0, 40), normal(1, 30) + 1),
        "separable": (normal(0, 40) - 50, normal(1, 30) + 50),
        "unbalanced": (normal(0, 400), normal(1, 5) + 1),
        "far": (normal(0, 20) + 300, normal(1, 20) + 301),
        "tiny scale": (1e-4 * normal(0, 40), 1e-4 * (normal(1, 30) + 1)),
    }[case]
    weight, bias = fit_logistic(positive, negative)
    x = torch.cat([positive, negative]).numpy()[:, None]
    y = np.repeat([1, 0], [len(positive), len(negative)])
    theirs = LogisticRegression(class_weight="balanced", tol=1e-10, max_iter=10_000, solver="newton-cholesky").fit(x, y)
    assert weight == pytest.approx(theirs.coef_[0, 0], rel=1e-4)
    assert bias == pytest.approx(theirs.intercept_[0], rel=1e-4, abs=1e-6)


def test_a_feature_that_never_varies_tells_nothing() -> None:
    assert fit_logistic(torch.full((7,), 3.0), torch.full((4,), 3.0)) == (0.0, 0.0)
    with pytest.raises(ValueError, match="0 and 4 samples"):
        fit_logistic(torch.empty(0), torch.zeros(4))


def test_entropy_attack_is_the_share_that_scikit_learns_attack_calls_members() -> None:
    retain, test, forget = 6 * normal(0, 60, 4), 2 * normal(1, 50, 4), 4 * normal(2, 40, 4)
    x = torch.cat([entropies(retain), entropies(test)]).numpy()[:, None]
    theirs = LogisticRegression(class_weight="balanced").fit(x, np.repeat([1, 0], [60, 50]))
    expected = theirs.predict(entropies(forget).numpy()[:, None]).mean()
    assert 0.2 < expected < 0.9
    assert entropy_attack(retain, test, forget) == pytest.approx(expected)


def test_entropy_attack_at_its_ends_and_without_samples() -> None:
    sure, unsure = torch.tensor([[9.0, 0.0]] * 8), torch.tensor([[0.1, 0.0]] * 8)
    assert entropy_attack(sure, unsure, sure[:3]) == 1.0
    assert entropy_attack(sure, unsure, unsure[:3]) == 0.0
    assert entropy_attack(sure, sure, sure) == 0.0
    assert math.isnan(entropy_attack(sure, unsure, sure[:0]))
    assert math.isnan(entropy_attack(sure[:0], unsure, sure))
    assert math.isnan(entropy_attack(sure, unsure, sure * math.nan))


def test_auc_by_hand_and_against_scikit_learn() -> None:
    # of 2 x 3 pairs: 3 beats all three; 1 beats 0, ties 1, loses to 2
    assert auc(torch.tensor([3.0, 1.0]), torch.tensor([0.0, 1.0, 2.0])) == pytest.approx((3 + 1.5) / 6)
    members, others = (2 * normal(0, 50) + 1).round(), (2 * normal(1, 70)).round()
    truth = np.repeat([1, 0], [50, 70])
    assert auc(members, others) == pytest.approx(roc_auc_score(truth, torch.cat([members, others]).numpy()))
    assert auc(others, members) == pytest.approx(1 - auc(members, others))
    assert math.isnan(auc(members[:0], others))
    assert math.isnan(auc(members * math.nan, others))


def test_true_positive_rate_is_never_interpolated() -> None:
    members, others = torch.tensor([5.0, 3.0, 1.0, 0.5]), torch.tensor([4.0, 2.0, 1.0, 0.0])
    assert tpr_at_fpr(members, others, 0.0) == 0.25
    assert tpr_at_fpr(members, others, 0.24) == 0.25
    assert tpr_at_fpr(members, others, 0.25) == 0.5
    # the member at 1 ties with another: to take it takes that one too
    assert tpr_at_fpr(members, others, 0.5) == 0.5
    assert tpr_at_fpr(members, others, 0.75) == 1.0
    assert tpr_at_fpr(members, others, 1.0) == 1.0
    with pytest.raises(ValueError, match="fpr=2"):
        tpr_at_fpr(members, others, 2)


@pytest.mark.parametrize("fpr", [0.0, 0.01, 0.1, 0.29, 0.5])
def test_true_positive_rate_is_a_point_of_scikit_learns_curve(fpr: float) -> None:
    members, others = (3 * normal(0, 60) + 2).round(), (3 * normal(1, 100)).round()
    false, true, _ = roc_curve(np.repeat([1, 0], [60, 100]), torch.cat([members, others]), drop_intermediate=False)
    assert tpr_at_fpr(members, others, fpr) == pytest.approx(true[false <= fpr + 1e-9].max())


@pytest.mark.parametrize(("references", "variance"), [(1, "holdout"), (2, "global"), (63, "global"), (64, "sample")])
def test_likelihood_ratio_finds_members_and_says_how(references: int, variance: str) -> None:
    hardness_F, hardness_H = 5 * normal(0, 80), 5 * normal(1, 90)
    never = hardness_F + normal(2, references, 80), hardness_H + normal(3, references, 90)
    holdout = hardness_H + normal(4, 90)
    seen = likelihood_ratio_attack(hardness_F + normal(5, 80) + 4, holdout, *never)
    assert (seen.variance, seen.num_references, seen.fpr) == (variance, references, 0.01)
    assert seen.auc > 0.95
    assert seen.tpr > 0.3
    forgotten = likelihood_ratio_attack(hardness_F + normal(5, 80), holdout, *never)
    assert forgotten.auc == pytest.approx(0.5, abs=0.12)
    # without the references, how hard the samples are hides who was a member
    assert auc(hardness_F + normal(5, 80) + 4, holdout) < 0.85


def test_likelihood_ratio_by_hand_with_a_variance_for_each_sample() -> None:
    # means 0; standard deviations sqrt 2 and 2 sqrt 2 for the forget samples, sqrt 2 for the holdout
    never_F, never_H = torch.tensor([[-1.0, -2.0], [1.0, 2.0]]), torch.tensor([[-1.0], [1.0]])
    model_F, model_H = torch.tensor([2.0, 2.0]), torch.tensor([1.5])
    apart = likelihood_ratio_attack(model_F, model_H, never_F, never_H, per_sample_from=2)
    assert (apart.auc, apart.variance) == (0.5, "sample")
    together = likelihood_ratio_attack(model_F, model_H, never_F, never_H)
    assert (together.auc, together.variance) == (1.0, "global")


def test_a_model_attacked_with_itself_as_reference_tells_nothing() -> None:
    forget, holdout = normal(0, 5), normal(1, 6)
    attack = likelihood_ratio_attack(forget, holdout, forget[None], holdout[None])
    assert (attack.auc, attack.tpr) == (0.5, 0.0)
    assert math.isnan(likelihood_ratio_attack(forget[:0], holdout[:0], torch.empty(3, 0), torch.empty(3, 0)).auc)
    with pytest.raises(ValueError, match="0 reference models"):
        likelihood_ratio_attack(forget, holdout, forget[None][:0], holdout[None][:0])
    with pytest.raises(ValueError, match=r"must be \(S, 5\)"):
        likelihood_ratio_attack(forget, holdout, holdout[None], holdout[None])


def test_loss_auc_and_privacy_leak() -> None:
    forget, holdout = torch.tensor([[3.0, 0.0], [2.0, 0.0]]), torch.tensor([[1.0, 0.0], [0.0, 0.0]])
    zeros = torch.zeros(2, dtype=torch.long)
    assert loss_auc(forget, zeros, holdout, zeros) == 1.0
    assert priv_leak(0.75, 0.5) == pytest.approx(0.5)
    assert priv_leak(0.4, 0.5) == pytest.approx(-0.2)
    assert math.isnan(priv_leak(0.4, 0.0))


def test_klom_histogram_by_hand() -> None:
    # two bins over [0, 1]: shares (3/4, 1/4) against (1/2, 1/2); the largest margin is inside the last bin
    unlearned, oracle = torch.tensor([[0.0], [0.1], [0.2], [1.0]]), torch.tensor([[0.0], [0.3], [0.7], [0.9]])
    result = klom(unlearned, oracle, bins=2, histogram_from=4)
    expected = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    assert (result.estimator, result.num_unlearned, result.num_oracle) == ("histogram", 4, 4)
    assert result.mean == pytest.approx(expected)
    assert result.percentile_95 == pytest.approx(expected)


def test_klom_of_disjoint_margins_is_bounded_by_the_least_share() -> None:
    far = torch.full((100, 1), 1e9), torch.full((100, 1), -1e9)
    assert klom(*far).mean == pytest.approx(math.log((1 + 1e-5) / 1e-5), rel=1e-9)
    assert klom(far[0][:2], far[1][:2]).mean == pytest.approx(math.log(1e5))
    assert klom(far[0], far[0]).mean == 0.0
    assert klom(far[0][:2], far[0][:2]).mean == 0.0


def test_klom_gaussian_by_hand_and_its_limits() -> None:
    # means 0 and 1, unbiased variances 2 and 8
    result = klom(torch.tensor([[-1.0], [1.0]]), torch.tensor([[-1.0], [3.0]]))
    assert result.estimator == "gaussian"
    assert result.mean == pytest.approx((math.log(8 / 2) + (2 + 1) / 8 - 1) / 2)
    assert math.isnan(klom(torch.zeros(1, 3), torch.zeros(5, 3)).mean)
    assert math.isnan(klom(torch.zeros(5, 0), torch.zeros(5, 0)).percentile_95)
    with pytest.raises(ValueError, match=r"\(U, N\)"):
        klom(torch.zeros(5, 2), torch.zeros(5, 3))
    with pytest.raises(ValueError, match="must be >= 1"):
        klom(torch.zeros(0, 2), torch.zeros(5, 2))
    with pytest.raises(ValueError, match="eps=0"):
        klom(torch.zeros(5, 2), torch.zeros(5, 2), eps=0)


def test_klom_of_one_distribution_is_its_noise_and_few_models_make_much_of_it_in_a_histogram() -> None:
    a, b = normal(0, 20, 200), normal(1, 20, 200)
    fitted, counted = klom(a, b), klom(a, b, histogram_from=20)
    assert fitted.mean < 0.2
    assert counted.mean > 2.0
    assert klom(a + 3, b).mean == pytest.approx(4.5, rel=0.3)


def test_klom_keeps_what_is_unknown_unknown() -> None:
    a = normal(0, 100, 2)
    a[3, 1] = math.nan
    for models in (100, 50):
        divergence = klom(a[:models], normal(1, models, 2)).per_sample
        assert divergence.isnan().tolist() == [False, True]
