"""Membership attacks: can predictions show that a sample was trained on? To be compared with the retrained reference.

An attack that fails does not prove that a sample was forgotten, and a retrained model is not at chance either: samples
of a forgotten class look unlike those of the remaining classes. What counts is the distance between the unlearned
model's number and the reference's, in either direction. No samples, or NaN among the scores, give NaN.
"""

# F = forget samples, H = holdout samples, S = reference models that have seen neither
from __future__ import annotations

from dataclasses import dataclass
from math import floor
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import softplus

from fedcl.evaluation.predictions import NAN, entropies, losses, mean, unbiased_variance

_SMALLEST_STD = 1e-6
_LARGEST_MARGIN = 100.0


def entropy_attack(retain_NC: Tensor, test_NC: Tensor, forget_NC: Tensor, *, l2: float = 1.0) -> float:
    """Return the share of forget samples that a logistic regression on the prediction's entropy calls trained on.

    It is fitted to the logits of the retain training samples (1) against test samples (0), balanced. Chundawat et al.,
    AAAI 2023, and Foster et al., "Selective Synaptic Dampening", AAAI 2024, with scikit-learn's
    ``LogisticRegression(class_weight="balanced")``. They ask it for its multinomial form, which is the same with half
    the penalty (``l2=0.5``) and which scikit-learn no longer offers. A score of 0 is no member.
    """
    members, others, asked = entropies(retain_NC), entropies(test_NC), entropies(forget_NC)
    if _unusable(members, others) or _unusable(asked):
        return NAN
    weight, bias = fit_logistic(members, others, l2=l2)
    return mean((weight * asked + bias > 0).double())


def fit_logistic(positive: Tensor, negative: Tensor, *, l2: float = 1.0) -> tuple[float, float]:
    """Return (weight, bias) of a balanced logistic regression on one feature, by damped Newton steps in float64.

    It minimises sum_i s_i ln(1 + exp(-t_i (w x_i + b))) + l2 w^2 / 2, t_i = 1 for ``positive`` and -1 for ``negative``,
    with s_i = n / (2 n_class), so that both classes weigh the same. The minimum is unique and finite for l2 > 0.

    Raises
    ------
    ValueError
        A class is empty, or ``l2`` is not positive.
    """
    if not (len(positive) and len(negative)) or not l2 > 0:
        raise ValueError(f"{len(positive)} and {len(negative)} samples, l2={l2}: must all be > 0")
    x = torch.cat([positive, negative]).double().cpu()
    design = torch.stack([x, torch.ones_like(x)], dim=1)
    is_positive = torch.arange(len(x)) < len(positive)
    share = len(x) / (2 * torch.where(is_positive, len(positive), len(negative)).double())
    sign = 2 * is_positive.double() - 1
    penalty = torch.tensor([l2, 0.0], dtype=torch.float64)

    def loss(theta: Tensor) -> float:
        return float(share @ softplus(-sign * (design @ theta)) + penalty @ theta.square() / 2)

    theta = torch.zeros(2, dtype=torch.float64)
    tolerance = 1e-12 * len(x) * max(1.0, float(x.abs().max()))
    for _ in range(100):
        p = torch.sigmoid(design @ theta)
        gradient = design.T @ (share * (p - is_positive.double())) + penalty * theta
        if float(gradient.abs().max()) <= tolerance:
            break
        hessian = design.T @ (design * (share * p * (1 - p))[:, None]) + torch.diag(penalty)
        step, now = torch.linalg.solve(hessian, gradient), loss(theta)
        # far from the minimum a full step may overshoot; one that gains nothing even when tiny is rounding
        size = next((s for s in (0.5**k for k in range(40)) if loss(theta - s * step) < now), 0.0)
        if not size:
            break
        theta = theta - size * step
    return float(theta[0]), float(theta[1])


def auc(members: Tensor, others: Tensor) -> float:
    """Return the probability that a member's score exceeds another's, ties counted half: the area under the ROC."""
    if _unusable(members, others):
        return NAN
    ordered = others.double().sort().values
    scores = members.double().to(ordered.device)
    below = torch.searchsorted(ordered, scores)
    up_to = torch.searchsorted(ordered, scores, right=True)
    return mean((below + up_to).double()) / (2 * len(ordered))


def tpr_at_fpr(members: Tensor, others: Tensor, fpr: float) -> float:
    """Return the largest share of members above any threshold that at most a share ``fpr`` of the others is above.

    Never interpolated: with fewer than 1 / fpr others no false positive at all is allowed, and the rate is that above
    the largest score of the others. Raises ``ValueError`` for ``fpr`` outside [0, 1].
    """
    if not 0 <= fpr <= 1:
        raise ValueError(f"fpr={fpr}: must be in [0, 1]")
    if _unusable(members, others):
        return NAN
    # the tiny term is for products such as 0.29 * 100, which rounding leaves below the whole number
    allowed = floor(fpr * len(others) + 1e-9)
    if allowed >= len(others):
        return 1.0
    threshold = others.double().sort(descending=True).values[allowed]
    return mean((members.double().to(threshold.device) > threshold).double())


@dataclass(frozen=True, slots=True)
class LikelihoodRatio:
    """What a likelihood-ratio attack reached: area under the ROC, and true-positive rate at false-positive rate `fpr`.

    ``variance`` says how the spread of the references was had: by ``sample``; ``global``, one for all samples; or
    ``holdout``, from the holdout samples alone as there was but one reference.
    """

    auc: float
    tpr: float
    fpr: float
    num_references: int
    variance: Literal["sample", "global", "holdout"]


def likelihood_ratio_attack(
    forget_F: Tensor,
    holdout_H: Tensor,
    reference_forget_SF: Tensor,
    reference_holdout_SH: Tensor,
    *,
    fpr: float = 0.01,
    per_sample_from: int = 64,
) -> LikelihoodRatio:
    """Attack by the margins of a model, given those of S reference models that saw none of the samples.

    Offline LiRA (Carlini et al., S&P 2022): each sample's margin under the references is taken as normal,
    and the sample scored by how far the model's margin lies above: (m - mean) / std, which orders samples as the
    one-sided test's 1 - Pr[Z > m] does without saturating. Few models do not give a variance for each sample, so below
    ``per_sample_from`` references all share the mean one. A single reference gives the differences m - m_ref, which is
    difficulty calibration (Watson et al., ICLR 2022): they are divided by their spread on the holdout samples, which
    changes neither AUC nor rate. The result says which was used.

    Holdout samples should be like the forget samples but for not being trained on: of a forgotten class, its test
    samples, since otherwise the classes are what is told apart.

    Parameters
    ----------
    forget_F, holdout_H
        Margins of the attacked model.
    reference_forget_SF, reference_holdout_SH
        Margins of the references, (S, F) and (S, H).
    fpr
        False-positive rate in [0, 1].
    per_sample_from
        References from which on every sample has a variance of its own; at least 2.

    Raises
    ------
    ValueError
        No references, shapes that do not match, or ``fpr`` outside [0, 1].
    """
    count = len(reference_forget_SF)
    if reference_forget_SF.shape != (count, len(forget_F)) or reference_holdout_SH.shape != (count, len(holdout_H)):
        raise ValueError(
            f"references of shapes {tuple(reference_forget_SF.shape)}, {tuple(reference_holdout_SH.shape)}: "
            f"must be (S, {len(forget_F)}) and (S, {len(holdout_H)})"
        )
    if not count:
        raise ValueError("0 reference models: must be >= 1")
    model = torch.cat([forget_F, holdout_H]).double().clamp(-_LARGEST_MARGIN, _LARGEST_MARGIN)
    references = torch.cat([reference_forget_SF, reference_holdout_SH], dim=1).to(model)
    references = references.clamp(-_LARGEST_MARGIN, _LARGEST_MARGIN)
    difference = model - references.mean(0)
    variance: Literal["sample", "global", "holdout"]
    if count == 1:
        variance, spread = "holdout", _spread(difference[len(forget_F) :])
    elif count < per_sample_from:
        variance, spread = "global", unbiased_variance(references).mean().sqrt()
    else:
        variance, spread = "sample", unbiased_variance(references).sqrt()
    score = difference / spread.clamp_min(_SMALLEST_STD)
    members, others = score[: len(forget_F)], score[len(forget_F) :]
    return LikelihoodRatio(auc(members, others), tpr_at_fpr(members, others, fpr), fpr, count, variance)


def loss_auc(forget_FC: Tensor, forget_targets_F: Tensor, holdout_HC: Tensor, holdout_targets_H: Tensor) -> float:
    """Return the area under the ROC of telling forget from holdout samples by a lower cross-entropy."""
    return auc(-losses(forget_FC, forget_targets_F), -losses(holdout_HC, holdout_targets_H))


def priv_leak(unlearned_auc: float, reference_auc: float) -> float:
    """Return PrivLeak = (AUC_u - AUC_r) / AUC_r: above 0 not enough was forgotten, below 0 too much; NaN for AUC_r = 0.

    Shi et al., "MUSE: Machine Unlearning Six-Way Evaluation", ICLR 2025, as commonly implemented; here the score is the
    loss (:func:`loss_auc`) in place of Min-K%.
    """
    return (unlearned_auc - reference_auc) / reference_auc if reference_auc else NAN


def _spread(values: Tensor) -> Tensor:
    return values.std() if len(values) > 1 else torch.ones((), dtype=values.dtype, device=values.device)


def _unusable(*scores: Tensor) -> bool:
    return any(not len(values) or bool(values.isnan().any()) for values in scores)
