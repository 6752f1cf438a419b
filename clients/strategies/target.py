"""TARGET's client half: distil the outputs of the last task's final model on synthetic samples.

Zhang et al., ICCV 2023: L = cross-entropy on the task's samples + weight KL(old model || model) on synthetic ones. The
server half, ``strategies/projection/target.py``, sends the samples with the old model's logits.
"""

# N = synthetic samples, B = batch, C = logit columns
from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from fedcl.contracts.learner import Batch, Context, Payload, Phase, Plugin
from fedcl.models.masks import divergence
from fedcl.models.networks import Output

INPUTS, LOGITS, COLUMNS = "target_inputs", "target_logits", "target_columns"


class SyntheticDistillation(Plugin):
    """Add ``weight`` times the distillation on ``batch_size`` synthetic samples a step; null: ``client.batch_size``."""

    phase: ClassVar[Phase] = Phase.REGULARISER
    payloads: ClassVar[tuple[Payload, ...]] = tuple(Payload(name, "down") for name in (INPUTS, LOGITS, COLUMNS))

    def __init__(self, *, weight: float = 1.0, temperature: float = 2.0, batch_size: int | None = None) -> None:
        self.weight, self.temperature, self.batch_size = weight, temperature, batch_size

    def loss(self, ctx: Context, batch: Batch, out: Output) -> Tensor | None:
        if self.weight == 0 or INPUTS not in ctx.payload:
            return None
        count = len(ctx.payload[INPUTS])
        chosen = torch.randperm(count, generator=ctx.rng("target"))[: self.batch_size or ctx.batch_size]
        x, teacher, columns = (ctx.payload[name][chosen].to(ctx.device) for name in (INPUTS, LOGITS, COLUMNS))
        allowed, scale = columns.bool(), self.weight * self.temperature**2
        return scale * divergence(teacher / self.temperature, ctx.model(x).logits / self.temperature, allowed)
