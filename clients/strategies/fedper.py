"""FedPer's and FedRep's client halves: the head stays with the client.

Arivazhagan et al., "Federated Learning with Personalization Layers", arXiv 1912.00818, Algorithm 2; Collins et al.,
"Exploiting Shared Representations for Personalized Federated Learning", ICML 2021, Algorithm 1.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from clients.strategies.kept import Kept
from clients.strategies.local_sgd import train_epochs
from fedcl.contracts.learner import Context
from fedcl.models.flat import TensorSpec, is_head


class FedPer(Kept):
    """Keep the heads."""

    name: ClassVar[str] = "heads"

    def keeps(self, tensor: TensorSpec) -> bool:
        return is_head(tensor)


class FedRep(FedPer):
    """Train the head alone for ``head_epochs`` epochs, then the body alone for the epochs of the configuration.

    The head's epochs are plain SGD on cross-entropy; the learner's other plugins take part in the body's.
    """

    def __init__(self, *, head_epochs: int = 5) -> None:
        super().__init__()
        self.head_epochs = head_epochs
        self._frozen: list[tuple[Tensor, Tensor]] = []

    def before_round(self, ctx: Context) -> None:
        """Train the head, then keep its weights."""
        model = ctx.model
        heads = [p for p, spec in zip(model.trainable, model.parameter_specs, strict=True) if is_head(spec)]
        body_buffers = model.flat[model.num_parameters :].clone()
        train_epochs(ctx, epochs=self.head_epochs, lr=ctx.lr, purpose="head", parameters=heads)
        model.flat[model.num_parameters :] = body_buffers
        self._frozen = [(p.data, p.detach().clone()) for p in heads]

    @torch.no_grad()
    def after_step(self, ctx: Context) -> None:
        """Restore the head: no gradient, momentum or weight decay moves it while the body learns."""
        for weight, kept in self._frozen:
            weight.copy_(kept)
