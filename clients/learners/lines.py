"""LiNeS: layer-wise scaling of what a visit has changed.

Wang et al., "LiNeS: Post-training Layer Scaling Prevents Forgetting and Enhances Model Merging", ICLR 2025. After
training, the change of layer l of L is multiplied by ``alpha + beta l / (L - 1)``. For a single task alpha + beta = 1:
the deepest layer keeps all of its change, and shallow layers, which other tasks share, keep least.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fedcl.client.plugin import Context, Phase, Plugin
from fedcl.models.flat import Spec

# P = length of the flat vector, L = layers


class LiNeS(Plugin):
    """Scale a visit's change before sending: by ``shallow`` (alpha) in the first layer, linearly up to 1 at the last.

    All heads together are the last layer. With ``shallow`` 1 nothing is computed.
    """

    phase = Phase.WEIGHT

    def __init__(self, *, shallow: float = 0.5) -> None:
        self.shallow = shallow

    @torch.no_grad()
    def after_round(self, ctx: Context) -> dict[str, Tensor]:
        """Put the model back along the way it came, shallow layers further."""
        if self.shallow != 1.0:
            factors = layer_factors(ctx.model.spec, self.shallow).to(ctx.device)
            ctx.model.flat.copy_(ctx.received + factors * (ctx.model.flat - ctx.received))
        return {}


def layer_factors(spec: Spec, shallow: float) -> Tensor:
    """Return each element's factor (P,). A layer is the tensors of one module, layers in the order of their tensors.

    A network of one layer keeps its whole change.
    """
    layers: dict[str, int] = {}
    numbers = []
    for tensor in spec:
        module = "head" if tensor.task is not None else tensor.name.rpartition(".")[0]
        numbers.append(layers.setdefault(module, len(layers)))
    last = max(len(layers) - 1, 1)
    factors = torch.ones(spec.size)
    for tensor, number in zip(spec, numbers, strict=True):
        factors[tensor.start : tensor.stop] = shallow + (1.0 - shallow) * number / last if len(layers) > 1 else 1.0
    return factors
