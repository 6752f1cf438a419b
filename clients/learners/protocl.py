"""ProtoCL: a generative head of one Gaussian a class, whose posterior is a sum over samples.

Kessler et al., "On Sequential Bayesian Inference for Continual Learning", 2023 (arXiv 2301.01828), section 5: features
phi of class c are N(mu_c, sigma^2 I) with prior mu_c ~ N(0, I / lambda); the class has a Dirichlet prior.
"""

# B = batch, C = logit columns, F = features
from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from clients.learners.closed_form import CLASS_SUMS, ClosedForm, Train, class_sums, write_heads
from fedcl.client.loop import masked_cross_entropy
from fedcl.contracts.fields import Form
from fedcl.contracts.learner import Batch, Context, Payload
from fedcl.models.flat import FlatModel
from fedcl.models.networks import Output

QUERY = "prototypes"


def log_joint(features_BF: Tensor, sums_CF: Tensor, counts_C: Tensor, noise: float, prior: float) -> Tensor:
    """Return log p(phi, c) of the posterior predictive, up to a constant: (B, C).

    Posterior of class c: precision L_c = prior + n_c / noise, mean (sum phi / noise) / L_c; predictive variance
    1 / L_c + noise in each of the F directions; class weight n_c + 1.
    """
    precision_C = prior + counts_C / noise
    mean_CF = sums_CF / noise / precision_C[:, None]
    variance_C = 1 / precision_C + noise
    distance_BC = torch.cdist(features_BF, mean_CF, compute_mode="donot_use_mm_for_euclid_dist").square()
    width = features_BF.shape[1]
    return -0.5 * (distance_BC / variance_C + width * torch.log(variance_C)) + torch.log(counts_C + 1)


class ProtoCL(ClosedForm):
    """Train the network so that samples are likely under their class's posterior; let the head say the same.

    In a local round, classes of earlier tasks have the posterior of all clients' samples, which comes with the model;
    those of the current task have that of the client's own samples, under the received weights. The head is linear:
    exact if all classes have the same number of samples, otherwise with an error of order 1 / n.

    Parameters
    ----------
    noise
        Variance sigma^2 of a feature around its class mean.
    prior
        Precision lambda of the prior of a mean.
    train
        When the network is trained: see `ClosedForm`. The paper trains in all tasks, with a memory:
        ``learner=[protocl,er]``.
    """

    payloads: ClassVar[tuple[Payload, ...]] = (Payload(QUERY, "down"),)
    queries: ClassVar[tuple[str, ...]] = (QUERY,)
    sums: ClassVar[Mapping[str, Form]] = {QUERY: CLASS_SUMS}
    key: ClassVar[str] = "protocl"

    def __init__(self, *, noise: float = 1.0, prior: float = 1.0, train: Train = "first_task") -> None:
        super().__init__(train=train)
        self.noise, self.prior = noise, prior
        self._sums_CF = self._counts_C = torch.zeros(0)

    def before_round(self, ctx: Context) -> None:
        """Join all clients' sums of earlier classes with the client's own sums of the current ones."""
        sums_CF, counts_C = (tensor.float().to(ctx.device) for tensor in class_sums(ctx).values())
        shared = ctx.payload.get(f"{QUERY}/features")
        if shared is not None:
            others_C = ctx.payload[f"{QUERY}/counts"].to(ctx.device)
            foreign_C = counts_C == 0
            sums_CF = torch.where(foreign_C[:, None], shared.to(ctx.device), sums_CF)
            counts_C = torch.where(foreign_C, others_C, counts_C)
        self._sums_CF, self._counts_C = sums_CF, counts_C

    def objective(self, ctx: Context, batch: Batch, out: Output) -> Tensor:
        """Return the mean of -log p(c | phi) over the classes of which some client has samples."""
        logits = log_joint(out.features, self._sums_CF, self._counts_C, self.noise, self.prior)
        seen = self._counts_C > 0
        mask = seen if batch.mask is None else seen & batch.mask
        return masked_cross_entropy(Output(logits, out.features), batch._replace(mask=mask))

    def respond(self, ctx: Context, name: str, request: dict[str, Tensor]) -> dict[str, Tensor]:
        return class_sums(ctx)

    def solve(self, model: FlatModel, sums: dict[str, Tensor]) -> None:
        """Write the linear discriminant of the posterior into the heads."""
        counts_C = sums["counts"]
        known_C = counts_C > 0
        precision_C = self.prior + counts_C / self.noise
        mean_CF = sums["features"] / self.noise / precision_C[:, None]
        variance = self.noise + float((1 / precision_C[known_C]).mean())
        bias_C = -0.5 * mean_CF.square().sum(1) / variance + torch.log(counts_C + 1) - math.log(float(counts_C.sum()))
        write_heads(model, mean_CF / variance, bias_C, known_C)
