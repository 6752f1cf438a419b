"""HFT: half fine-tuning.

Hui et al., "HFT: Half Fine-Tuning for Large Language Models", 2024 (arXiv 2404.18466). In every round of training a
random half of the parameters is frozen, drawn again each time; frozen parameters keep what they learned before.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fedcl.contracts.learner import Context, Phase, Plugin
from fedcl.models.flat import FlatModel

# P = parameter elements


class HFT(Plugin):
    """Freeze a random ``share`` of the output units of every layer, drawn again in each local round.

    A unit is a row of a weight with its bias. Heads train whole, since a class whose row is frozen cannot be learned.
    With ``share`` 0 nothing is computed.
    """

    phase = Phase.WEIGHT

    def __init__(self, *, share: float = 0.5) -> None:
        self.share = share
        self._frozen_P: Tensor | None = None

    def before_round(self, ctx: Context) -> None:
        """Draw the frozen units, the same for a layer's weight and bias."""
        if self.share:
            self._frozen_P = frozen_units(ctx.model, self.share, ctx.rng("half"))

    @torch.no_grad()
    def after_step(self, ctx: Context) -> None:
        """Restore frozen weights, which momentum or weight decay may have moved."""
        if self._frozen_P is not None:
            parameters_P = ctx.model.flat[: len(self._frozen_P)]
            torch.where(self._frozen_P, ctx.received[: len(self._frozen_P)], parameters_P, out=parameters_P)


def frozen_units(model: FlatModel, share: float, generator: torch.Generator) -> Tensor:
    """Return which parameters are frozen, bool (P,): round(share x units) units of each module but the heads."""
    frozen = torch.zeros(model.num_parameters, dtype=torch.bool)
    drawn: dict[str, Tensor] = {}
    for spec in model.parameter_specs:
        module = spec.name.rpartition(".")[0]
        if module == "head" or spec.task is not None or not spec.shape:
            continue
        units = spec.shape[0]
        if module not in drawn:
            drawn[module] = torch.zeros(units, dtype=torch.bool)
            drawn[module][torch.randperm(units, generator=generator)[: round(share * units)]] = True
        if len(drawn[module]) == units:
            frozen[spec.start : spec.stop] = drawn[module].repeat_interleave(spec.size // units)
    return frozen.to(model.device)
