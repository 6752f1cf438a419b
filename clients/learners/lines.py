"""LiNeS: layer-wise scaling of a local round's change.

Wang et al., "LiNeS: Post-training Layer Scaling Prevents Forgetting and Enhances Model Merging", ICLR 2025. After
training, the change of layer l of L is multiplied by ``alpha + beta l / (L - 1)``. For a single task alpha + beta = 1:
the deepest layer keeps all of its change, and shallow layers, which other tasks share, keep least.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fedcl.contracts.learner import Context, Phase, Plugin
from fedcl.models.merge import layer_factors, scaled_change


class LiNeS(Plugin):
    """Scale a local round's change before sending: by ``shallow`` (alpha) in the first layer, 1 in the last.

    All heads together are the last layer. With ``shallow`` 1 nothing is computed.
    """

    phase = Phase.WEIGHT

    def __init__(self, *, shallow: float = 0.5) -> None:
        self.shallow = shallow

    @torch.no_grad()
    def after_round(self, ctx: Context) -> dict[str, Tensor]:
        """Scale each layer's change; shallow layers keep less of it."""
        if self.shallow != 1.0:
            factors = layer_factors(ctx.model.spec, self.shallow).to(ctx.device)
            ctx.model.flat.copy_(scaled_change(ctx.received, ctx.model.flat, factors))
        return {}
