"""FedPer's and FedRep's client halves: the head stays with the client.

Arivazhagan et al., "Federated Learning with Personalization Layers", arXiv 1912.00818, Algorithm 2; Collins et al.,
"Exploiting Shared Representations for Personalized Federated Learning", ICML 2021, Algorithm 1.
"""

# P = length of the flat vector
from __future__ import annotations

import re
from typing import ClassVar

import torch
from torch import Tensor

from clients.local_sgd import train_epochs
from fedcl.client.plugin import Context, Phase, Plugin, State
from fedcl.models.flat import FlatModel, TensorSpec

_HEAD = re.compile(r"(?:^|\.)heads?\.")  # as strategies.collaboration.fedper knows them


def is_head(tensor: TensorSpec) -> bool:
    """Whether ``tensor`` belongs to a head: ``head.*``, or ``heads.<k>.*`` where tasks have their own."""
    return _HEAD.search(tensor.name) is not None


def head_mask(model: FlatModel) -> Tensor:
    """Return which positions of the flat vector belong to heads, bool (P,)."""
    mask = torch.zeros(model.spec.size, dtype=torch.bool, device=model.device)
    for tensor in model.spec:
        if is_head(tensor):
            mask[tensor.start : tensor.stop] = True
    return mask


class FedPer(Plugin):
    """Put the client's own heads in place of those received, and take them out again before the reply.

    The reply carries the received heads, so a client's own never travel. A client that has never trained uses the
    initial ones.
    """

    phase: ClassVar[Phase] = Phase.DATA  # before anyone looks at the model

    def __init__(self) -> None:
        self._heads: Tensor | None = None

    def state(self) -> State:
        """Return the heads' numbers in the order of the flat vector."""
        return {} if self._heads is None else {"heads": self._heads}

    def load(self, state: State) -> None:
        """Restore them."""
        self._heads = state.get("heads")

    def setup(self, ctx: Context) -> None:
        """Join body and heads."""
        if self._heads is not None:
            ctx.model.flat[head_mask(ctx.model)] = self._heads.to(ctx.device)

    def after_round(self, ctx: Context) -> dict[str, Tensor]:
        """Keep the heads and send the received ones back."""
        mask = head_mask(ctx.model)
        self._heads = ctx.model.flat[mask].clone()
        ctx.model.flat[mask] = ctx.received[mask]
        return {}


class FedRep(FedPer):
    """Train the head alone for ``head_epochs`` epochs, then the body alone for the epochs of the configuration.

    The head's epochs are plain SGD on cross-entropy; the learner's other plugins take part in the body's.

    Raises
    ------
    ValueError
        If ``head_epochs`` is less than 1.
    """

    def __init__(self, *, head_epochs: int = 5) -> None:
        if head_epochs < 1:
            raise ValueError(f"strategy.collaboration.client.head_epochs={head_epochs}: must be int >= 1")
        super().__init__()
        self.head_epochs = head_epochs
        self._frozen: list[tuple[Tensor, Tensor]] = []

    def before_round(self, ctx: Context) -> None:
        """Train the head, then note where it stands."""
        model = ctx.model
        pairs = zip(model.parameters, model.parameter_specs, strict=True)
        heads = [p for p, spec in pairs if p.requires_grad and is_head(spec)]
        body_buffers = model.flat[model.num_parameters :].clone()
        train_epochs(ctx, epochs=self.head_epochs, lr=ctx.lr, purpose="head", parameters=heads)
        model.flat[model.num_parameters :] = body_buffers
        self._frozen = [(p.data, p.detach().clone()) for p in heads]

    @torch.no_grad()
    def after_step(self, ctx: Context) -> None:
        """Put the head back: no gradient, momentum or weight decay moves it while the body learns."""
        for weight, kept in self._frozen:
            weight.copy_(kept)
