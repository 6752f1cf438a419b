"""KLoM: how far the margins of unlearned models are from those of retrained ones, sample by sample.

Georgiev et al., "Attribute-to-Delete: Machine Unlearning via Datamodel Matching", 2024, with the constants of the code
of RoyRin/data-unlearning-bench: for every sample the margins of many unlearned models form one distribution, those of
many retrained models (oracles) another, and the divergence between them is the score. It is the only
unlearning metric that compares distributions over training runs, and it needs as many runs.
"""

# U = unlearned models, O = oracles, N = samples, B = bins
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import log
from typing import Literal

import torch
from torch import Tensor

from fedcl.evaluation.predictions import NAN, mean, unbiased_variance

_SMALLEST_VARIANCE = 1e-10


@dataclass(frozen=True, slots=True)
class Klom:
    """Divergence by sample (N,), in nats, with how many models it was estimated from and by which ``estimator``."""

    per_sample: Tensor
    num_unlearned: int
    num_oracle: int
    estimator: Literal["histogram", "gaussian"]

    @property
    def mean(self) -> float:
        """Mean over samples; NaN without any."""
        return mean(self.per_sample)

    @property
    def percentile_95(self) -> float:
        """The divergence that 95 % of the samples do not exceed (linear interpolation); NaN without samples."""
        return float(self.per_sample.quantile(0.95)) if len(self.per_sample) else NAN


def klom(
    unlearned_UN: Tensor,
    oracle_ON: Tensor,
    *,
    bins: int = 20,
    clip: float = 100.0,
    eps: float = 1e-5,
    histogram_from: int = 100,
) -> Klom:
    """Return KL(unlearned || oracle) of the margins (``predictions.margins``) of every sample.

    With at least ``histogram_from`` models of either kind, both are counted in ``bins`` bins of equal width from the
    smallest to the largest of all margins, and sum_b p_b ln(p_b / q_b) is taken with q_b at least ``eps`` where p_b is
    not 0, renormalised. The published code puts the largest margin outside of its last bin; here it is inside.

    A histogram of few models finds a difference where there is none: the same normal distribution drawn twice gives
    about 3.1 nats with 20 models, 0.9 with 50, 0.3 with 100. Below, normal distributions are fitted instead:
    (ln(v_o / v_u) + (v_u + (mu_u - mu_o)^2) / v_o - 1) / 2 with unbiased variances, cut at ln(1 / eps), the largest
    value that a histogram gives, since a small variance of a handful of oracles has no bound. It too is not 0 for the
    same distribution: about 0.2 for 10 models, 0.7 for 5. So compare with the number of one half of the oracles
    against the other. With one model of a kind there is no variance: NaN.

    Parameters
    ----------
    unlearned_UN, oracle_ON
        Margins of U and O models on the same samples.
    bins, clip, eps, histogram_from
        Number of bins; margins are cut to +-clip; least share of a bin; models from which on to use the histogram.

    Raises
    ------
    ValueError
        The samples of the two differ in number, there are no models, or a parameter is not positive.
    """
    if unlearned_UN.ndim != 2 or oracle_ON.ndim != 2 or unlearned_UN.shape[1] != oracle_ON.shape[1]:
        raise ValueError(
            f"margins of shapes {tuple(unlearned_UN.shape)} and {tuple(oracle_ON.shape)}: must be (U, N) and (O, N)"
        )
    if not len(unlearned_UN) or not len(oracle_ON):
        raise ValueError(f"{len(unlearned_UN)} unlearned models and {len(oracle_ON)} oracles: must be >= 1")
    if bins < 1 or not clip > 0 or not 0 < eps < 1:
        raise ValueError(f"bins={bins}, clip={clip}, eps={eps}: must be >= 1, > 0 and in (0, 1)")
    unlearned = unlearned_UN.double().clamp(-clip, clip)
    oracle = oracle_ON.to(unlearned).clamp(-clip, clip)
    enough = min(len(unlearned), len(oracle)) >= histogram_from
    divergence = _histogram(unlearned, oracle, bins, eps) if enough else _gaussian(unlearned, oracle, log(1 / eps))
    divergence = divergence.masked_fill(unlearned.isnan().any(0) | oracle.isnan().any(0), NAN)
    return Klom(divergence, len(unlearned), len(oracle), "histogram" if enough else "gaussian")


def ensemble_distance(unlearned: Mapping[str, Tensor], oracle: Mapping[str, Tensor]) -> dict[str, float]:
    """Return :func:`klom` of each set, by name, and how many models of a kind it comes from.

    - ``klom/SET``, ``klom/SET_p95``: mean and 95th percentile over samples.
    - ``klom/SET_floor``: the mean of one half of the oracles against the other, from four of them on: what no
      difference looks like with half as many models.
    - ``klom/models``: the smaller of the two numbers of models.

    Parameters
    ----------
    unlearned, oracle
        Set -> margins (U, N) and (O, N) of the same samples.
    """
    numbers: dict[str, float] = {}
    for name, margins_UN in unlearned.items():
        found = klom(margins_UN, oracle[name])
        numbers |= {f"klom/{name}": found.mean, f"klom/{name}_p95": found.percentile_95}
        numbers["klom/models"] = float(min(found.num_unlearned, found.num_oracle))
        middle = len(oracle[name]) // 2
        if middle >= 2:
            numbers[f"klom/{name}_floor"] = klom(oracle[name][:middle], oracle[name][middle:]).mean
    return numbers


def _histogram(unlearned_UN: Tensor, oracle_ON: Tensor, bins: int, eps: float) -> Tensor:
    low = torch.minimum(unlearned_UN.amin(0), oracle_ON.amin(0))
    width = torch.maximum(unlearned_UN.amax(0), oracle_ON.amax(0)) - low
    width = width.where(width > 0, 1.0)

    def shares(margins_MN: Tensor) -> Tensor:
        position = ((margins_MN - low) / width * bins).nan_to_num().long().clamp(0, bins - 1)
        counts = torch.zeros((bins, margins_MN.shape[1]), dtype=torch.float64, device=margins_MN.device)
        return counts.scatter_add(0, position, torch.ones_like(margins_MN)) / len(margins_MN)

    p_BN, q_BN = shares(unlearned_UN), shares(oracle_ON)
    q_BN = q_BN.clamp_min(eps).where(p_BN > 0, q_BN)
    return (torch.xlogy(p_BN, p_BN) - torch.xlogy(p_BN, q_BN / q_BN.sum(0))).sum(0)


def _gaussian(unlearned_UN: Tensor, oracle_ON: Tensor, largest: float) -> Tensor:
    if min(len(unlearned_UN), len(oracle_ON)) < 2:
        return torch.full_like(unlearned_UN[0], NAN)
    var_u = unbiased_variance(unlearned_UN).clamp_min(_SMALLEST_VARIANCE)
    var_o = unbiased_variance(oracle_ON).clamp_min(_SMALLEST_VARIANCE)
    shift = (unlearned_UN.mean(0) - oracle_ON.mean(0)).square()
    return (((var_o / var_u).log() + (var_u + shift) / var_o - 1) / 2).clamp_max(largest)
