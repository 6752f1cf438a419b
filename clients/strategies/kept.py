"""What FedPer, FedRep and FedBN share: some tensors of the model stay with the client."""

# P = length of the flat vector
from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from fedcl.contracts.learner import Context, Phase, Plugin, State
from fedcl.models.flat import FlatModel, TensorSpec


class Kept(Plugin):
    """Put the client's own tensors in place of those received, and take them out again before the reply.

    The reply carries the received ones, so a client's own never travel. A client that has never trained uses the
    initial ones. ``name`` is the state's key.
    """

    phase: ClassVar[Phase] = Phase.DATA  # before anyone looks at the model
    name: ClassVar[str] = "kept"

    def __init__(self) -> None:
        self._own: Tensor | None = None

    @abstractmethod
    def keeps(self, tensor: TensorSpec) -> bool:
        """Whether ``tensor`` stays with the client."""

    def mask(self, model: FlatModel) -> Tensor:
        """Return which positions of the flat vector stay with the client, bool (P,)."""
        mask = torch.zeros(model.spec.size, dtype=torch.bool, device=model.device)
        for tensor in model.spec:
            if self.keeps(tensor):
                mask[tensor.start : tensor.stop] = True
        return mask

    def state(self) -> State:
        """Return the kept numbers in the order of the flat vector."""
        return {} if self._own is None else {self.name: self._own}

    def load(self, state: State) -> None:
        self._own = state.get(self.name)

    def setup(self, ctx: Context) -> None:
        if self._own is not None:
            ctx.model.flat[self.mask(ctx.model)] = self._own.to(ctx.device)

    def after_round(self, ctx: Context) -> dict[str, Tensor]:
        """Keep the client's own tensors, and send the received ones back."""
        mask = self.mask(ctx.model)
        self._own = ctx.model.flat[mask].clone()
        ctx.model.flat[mask] = ctx.received[mask]
        return {}
