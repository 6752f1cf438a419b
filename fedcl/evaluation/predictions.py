"""How one model's predictions agree with the labels, and how two models' predictions agree with each other.

Logits are (N, C); columns that may not be predicted are -inf and take no part. Everything is computed in float64 from
log-probabilities, so that nothing underflows; means are over samples, divergences in nats. Without samples a number is
NaN. So it is for a model that has diverged to NaN: it has no accuracy, and must not pass for one that has forgotten.
"""

# N = samples, C = columns
from __future__ import annotations

from collections.abc import Callable, Sequence
from math import log
from typing import Literal

import torch
from torch import Tensor

from fedcl.models.flat import FlatModel
from fedcl.models.masks import column_mask
from fedcl.models.networks import Output

NAN = float("nan")


@torch.no_grad()
def predict(
    model: FlatModel, vector: Tensor, x: Tensor, *, columns: Sequence[int] | None = None, batch_size: int = 1024
) -> Output:
    """Return logits (N, C) and features (N, F) of the weights ``vector`` (P,) for samples ``x``, on the model's device.

    The model holds ``vector`` afterwards, in evaluation mode.

    Parameters
    ----------
    model, vector, x
        The network, its weights, and the samples, which may be on another device.
    columns
        The columns that may be predicted; the others become -inf. None for all of them.
    batch_size
        Samples in one forward pass.
    """
    model.load(vector)
    model.eval()
    # without samples, one empty batch still gives the shapes
    parts = [model(batch.to(model.device)) for batch in torch.split(x, batch_size)]
    logits = torch.cat([part.logits for part in parts])
    return Output(allow(logits, columns), torch.cat([part.features for part in parts]))


def masked(logits_NC: Tensor, mask: Tensor | None) -> Tensor:
    """Return the logits with -inf where the bool ``mask``, (C,) or (N, C), is false; unchanged for None."""
    return logits_NC if mask is None else logits_NC.masked_fill(~mask, -torch.inf)


def allow(logits_NC: Tensor, columns: Sequence[int] | None) -> Tensor:
    """Return the logits with -inf outside of ``columns``; unchanged for None."""
    return masked(logits_NC, column_mask(columns, logits_NC.shape[1], logits_NC.device))


@torch.no_grad()
def score(
    logits_of: Callable[[Tensor], Tensor], x: Tensor, y: Tensor, *, batch_size: int = 1024
) -> tuple[Tensor, Tensor]:
    """Return which samples are predicted right, and which are predicted at all, bool (N,) each.

    A sample whose largest logit is NaN or infinite has no prediction, and counts as wrong. (Of a model that has
    diverged, argmax would pick a class all the same, and its accuracy look like chance.)

    Parameters
    ----------
    logits_of
        Maps a batch of samples to logits (B, C), -inf in columns that may not be predicted.
    x, y
        Samples (N, ...) and their columns (N,), on the model's device.
    batch_size
        Samples in one forward pass.
    """
    right, defined = torch.zeros_like(y, dtype=torch.bool), torch.zeros_like(y, dtype=torch.bool)
    for start in range(0, len(y), batch_size):
        rows = slice(start, start + batch_size)
        largest = logits_of(x[rows]).max(1)
        defined[rows] = largest.values.isfinite()
        right[rows] = (largest.indices == y[rows]) & defined[rows]
    return right, defined


def mean(values: Tensor) -> float:
    """Return the mean as a number: NaN of nothing."""
    return float(values.double().mean()) if values.numel() else NAN


def unbiased_variance(values_MN: Tensor) -> Tensor:
    """Return the variance over M >= 2 models of each of N values, (N,), which may be none (torch's own then warns)."""
    return (values_MN - values_MN.mean(0)).square().sum(0) / (len(values_MN) - 1)


def hits(logits_NC: Tensor, targets_N: Tensor) -> Tensor:
    """Return 1.0 for samples predicted right, 0.0 for the others, NaN where the logits are: (N,).

    Raises
    ------
    ValueError
        The logits are not a matrix, or there is not one target for each row.
    """
    if logits_NC.ndim != 2 or targets_N.shape != logits_NC.shape[:1]:
        raise ValueError(
            f"logits of shape {tuple(logits_NC.shape)}, targets of shape {tuple(targets_N.shape)}: "
            "must be (N, C) and (N,)"
        )
    right = (logits_NC.argmax(1) == targets_N.to(logits_NC.device)).double()
    return right.masked_fill(logits_NC.isnan().any(1), NAN)


def accuracy(logits_NC: Tensor, targets_N: Tensor) -> float:
    """Return the share of samples whose target has the largest logit, in [0, 1]. Raises as :func:`hits`."""
    return mean(hits(logits_NC, targets_N))


def losses(logits_NC: Tensor, targets_N: Tensor) -> Tensor:
    """Return each sample's cross-entropy (N,), in nats; +inf where the target may not be predicted."""
    return -_log_probabilities(logits_NC).gather(1, targets_N.to(logits_NC.device)[:, None])[:, 0]


def entropies(logits_NC: Tensor) -> Tensor:
    """Return each prediction's entropy (N,), in nats: in [0, ln C]."""
    logp = _log_probabilities(logits_NC)
    return -_expectation(logp, logp)


def margins(logits_NC: Tensor, targets_N: Tensor, *, clip: float = 100.0) -> Tensor:
    """Return each sample's logit margin m = z_y - logsumexp_{c != y} z_c = ln p_y / (1 - p_y), cut to +-clip: (N,).

    The logit scaling of Carlini et al., "Membership Inference Attacks From First Principles", S&P 2022.
    """
    z = logits_NC.double()
    index = targets_N.to(z.device)[:, None]
    others = z.scatter(1, index, -torch.inf).logsumexp(1)
    return (z.gather(1, index)[:, 0] - others).clamp(-clip, clip)


def kl_divergence(logits_NC: Tensor, other_NC: Tensor) -> float:
    """Return the mean over samples of KL(p || q) = sum_c p_c ln(p_c / q_c), p and q the softmax of the two, in nats.

    +inf where q excludes (by -inf) a column that p does not. Raises ``ValueError`` for different shapes.
    """
    _same_shape(logits_NC, other_NC)
    logp, logq = _log_probabilities(logits_NC), _log_probabilities(other_NC)
    return mean(_expectation(logp, logp - logq))


def activation_distance(logits_NC: Tensor, other_NC: Tensor) -> float:
    """Return the mean over samples of ||softmax(z) - softmax(z')||_2, in [0, sqrt 2].

    Golatkar et al., "Eternal Sunshine of the Spotless Net", CVPR 2020, as commonly implemented for the outputs alone.
    Raises ``ValueError`` for different shapes.
    """
    _same_shape(logits_NC, other_NC)
    difference = logits_NC.double().softmax(1) - other_NC.double().softmax(1)
    return mean(torch.linalg.vector_norm(difference, dim=1))


def zrf(logits_NC: Tensor, random_NC: Tensor, scale: Literal["normalised", "legacy"] = "normalised") -> float:
    """Return the zero-retrain forgetting score, 1 minus the divergence from a randomly initialised model.

    Chundawat et al., "Can Bad Teaching Induce Forgetting?", AAAI 2023. With m = (p + q) / 2:

    - ``normalised``: 1 - mean_n (KL(p || m) + KL(q || m)) / (2 ln 2): in [0, 1], 1 for equal predictions.
    - ``legacy``: 1 - mean_{n,c} m (ln(m / p) + ln(m / q)) / 2, as the published code has it: the arguments are in the
      other order and the sum over columns is divided by C, so that it nears 1 as the classes become more and numbers of
      data sets with different C do not compare. Not bounded below.

    Raises
    ------
    ValueError
        Different shapes, or another scale.
    """
    _same_shape(logits_NC, random_NC)
    logp, logq = _log_probabilities(logits_NC), _log_probabilities(random_NC)
    logm = torch.logaddexp(logp, logq) - log(2)
    if scale == "normalised":
        js = (_expectation(logp, logp - logm) + _expectation(logq, logq - logm)) / (2 * log(2))
        return 1 - mean(js)
    if scale == "legacy":
        js = (_expectation(logm, logm - logp) + _expectation(logm, logm - logq)) / 2
        return 1 - mean(js) / logits_NC.shape[1]
    raise ValueError(f"scale={scale!r}: must be one of normalised, legacy")


def backdoor_success(logits_NC: Tensor, targets_N: Tensor, target_class: int) -> float:
    """Return the share of samples with the trigger that are predicted as ``target_class``, in [0, 1].

    Samples of this class are left out: predicting them as such is not a success of the attack.
    As in Gu et al., "BadNets", 2017. Raises as :func:`hits`.
    """
    aimed = hits(logits_NC, torch.full_like(targets_N, target_class))
    return mean(aimed[targets_N.to(aimed.device) != target_class])


def _log_probabilities(logits_NC: Tensor) -> Tensor:
    return logits_NC.double().log_softmax(1)


def _expectation(logp_NC: Tensor, values_NC: Tensor) -> Tensor:
    """Return sum_c p_c v_c (N,), where a column without probability counts 0 whatever its value."""
    p = logp_NC.exp()
    return (p * values_NC).where(p != 0, 0.0).sum(1)


def _same_shape(logits_NC: Tensor, other_NC: Tensor) -> None:
    if logits_NC.ndim != 2 or logits_NC.shape != other_NC.shape:
        raise ValueError(
            f"logits of shapes {tuple(logits_NC.shape)} and {tuple(other_NC.shape)}: must both be the same (N, C)"
        )
