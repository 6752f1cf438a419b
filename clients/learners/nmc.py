"""NMC: the nearest class mean classifies.

Mensink et al., "Distance-Based Image Classification: Generalizing to New Classes at Near-Zero Cost", TPAMI 2013; Janson
et al., "A Simple Baseline that Questions the Use of Pretrained-Models in Continual Learning", 2022.
"""

# B = batch, C = logit columns, F = features
from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from clients.learners.closed_form import CLASS_SUMS, ClosedForm, Train, class_sums, write_heads
from fedcl.contracts.fields import Form
from fedcl.contracts.learner import Context
from fedcl.models.flat import FlatModel

Distance = Literal["cosine", "euclidean", "unit_euclidean"]


class NearestClassMean(ClosedForm):
    """Let the head choose the class whose mean over all clients' samples is nearest.

    Parameters
    ----------
    distance
        ``cosine``: features and means of length 1. ``euclidean``: argmin |z - mu|^2 = argmax mu z - |mu|^2 / 2.
        ``unit_euclidean``, the rule of Janson et al.: the same with features of length 1 and means as they are, so that
        a class whose features point in many directions has a short mean; needs ``model.head=unit``.
    train
        When the network itself is trained: see `ClosedForm`.
    """

    queries: ClassVar[tuple[str, ...]] = ("class_sums",)
    sums: ClassVar[Mapping[str, Form]] = {"class_sums": CLASS_SUMS}
    key: ClassVar[str] = "nmc"

    def __init__(self, *, distance: Distance = "cosine", train: Train = "first_task") -> None:
        super().__init__(train=train)
        self.distance = distance

    def check(self, model: FlatModel) -> None:
        """Reject a model without a linear head, and for ``unit_euclidean`` one whose features are not of length 1.

        Raises
        ------
        ValueError
            Naming the setting to choose.
        """
        super().check(model)
        if self.distance == "unit_euclidean" and "unit" not in model.module._modules:
            raise ValueError("learner.nmc.distance=unit_euclidean: needs features of length 1; set model.head=unit")

    def respond(self, ctx: Context, name: str, request: dict[str, Tensor]) -> dict[str, Tensor]:
        return class_sums(ctx, unit=self.distance == "cosine")

    def solve(self, model: FlatModel, sums: dict[str, Tensor]) -> None:
        means_CF = sums["features"] / sums["counts"].clamp_min(1.0)[:, None]
        known_C = sums["counts"] > 0
        if self.distance == "cosine":
            write_heads(model, F.normalize(means_CF, dim=1), torch.zeros(len(means_CF)), known_C)
        else:
            write_heads(model, means_CF, -0.5 * means_CF.square().sum(1), known_C)
