"""Written-out steps of SGD on plain linear networks: backpropagation whose last product is the update itself.

The same mathematics as the loop's (`fedcl.client.loop`), in a third of the calls: no graph is built, and a weight's
gradient is never stored, ``W <- W - lr / B dY^T X`` being one product that accumulates into W. Rounding differs from
the loop's in the last bits.
"""

# B = batch, C = logit columns, D = a layer's inputs, F = its outputs, P = parameters
from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fedcl.contracts.learner import Batch, Context, Plugin, overrides
from fedcl.models.chain import Chain
from fedcl.models.networks import RandomLayer

UNFUSED = ("objective", "loss", "after_backward")  # hooks that need a gradient, or a graph to add a term to
Layer = tuple[Tensor, Tensor]  # weight (F, D) and bias (F,)


def needs_gradient(plugins: Sequence[Plugin]) -> bool:
    """Whether a plugin takes part in the loss or edits gradients."""
    return any(overrides(plugin, hook) for plugin in plugins for hook in UNFUSED)


class FusedStep:
    """A step of SGD with momentum and weight decay, as in the loop, on a model whose layers ``chain`` names.

    Parameters
    ----------
    ctx
        The context; its model is moved in place.
    chain
        The model's layers.
    lr, momentum, weight_decay
        As in `fedcl.contracts.learner.LocalTraining`.
    """

    def __init__(self, ctx: Context, chain: Chain, *, lr: float, momentum: float, weight_decay: float) -> None:
        model = ctx.model
        self._chain, self._lr, self._momentum, self._weight_decay = chain, lr, momentum, weight_decay
        self._flat = model.flat[: model.num_parameters]
        self._velocity = torch.zeros_like(self._flat) if momentum else None
        moved = self._flat if self._velocity is None else self._velocity
        layers = (*chain.hidden, *chain.heads)
        self._layers = [_views(self._flat, ctx, names) for names in layers]
        self._moved = self._layers if self._velocity is None else [_views(moved, ctx, names) for names in layers]
        drawing = (layer for layer in model.module.modules() if isinstance(layer, RandomLayer))
        self._generator = next((layer.generator for layer in drawing), None)

    @torch.inference_mode()
    def __call__(self, batch: Batch) -> Tensor:
        """Move the model by one step on ``batch`` and return its mean cross-entropy before."""
        few = len(self._chain.hidden)
        inputs = [batch.x.flatten(1)]
        kept: list[Tensor | None] = []
        for (weight, bias), p in zip(self._layers[:few], self._chain.dropout, strict=True):
            h = torch.addmm(bias, inputs[-1], weight.t()).relu_()
            kept.append(self._drop(h, p))
            inputs.append(h)
        features = inputs[-1]
        logits = [torch.addmm(bias, features, weight.t()) for weight, bias in self._layers[few:]]
        whole = logits[0] if len(logits) == 1 else torch.cat(logits, 1)
        if batch.mask is not None:
            whole = whole.masked_fill(~batch.mask, float("-inf"))
        log_p = torch.log_softmax(whole, 1)
        target = batch.y.unsqueeze(1)
        loss = -log_p.gather(1, target).mean()
        signal = log_p.exp().scatter_add_(1, target, log_p.new_full((len(target), 1), -1.0))
        if self._velocity is not None:
            self._velocity.mul_(self._momentum)
            if self._weight_decay:
                self._velocity.add_(self._flat, alpha=self._weight_decay)
        scale = (-self._lr if self._velocity is None else 1.0) / len(target)
        back = self._heads_back(signal, features, scale)
        for k in reversed(range(few)):
            mask = kept[k]
            signal = torch.ops.aten.threshold_backward(back if mask is None else back.mul_(mask), inputs[k + 1], 0.0)
            if k:
                back = signal @ self._layers[k][0]
            self._accumulate(self._moved[k], signal, inputs[k], scale)
        if self._velocity is not None:
            self._flat.add_(self._velocity, alpha=-self._lr)
        return loss

    def _drop(self, h_BF: Tensor, p: float) -> Tensor | None:
        """Drop entries in place as the layer would, and return the factors."""
        if not p or self._generator is None:
            return None
        keep = torch.rand(h_BF.shape, generator=self._generator, device=self._generator.device) >= p
        mask = keep.to(h_BF.device, h_BF.dtype) / (1.0 - p)
        h_BF.mul_(mask)
        return mask

    def _heads_back(self, signal_BC: Tensor, features_BF: Tensor, scale: float) -> Tensor:
        """Move the heads and return the gradient at their inputs, from the weights as they were."""
        few = len(self._chain.hidden)
        parts = torch.split(signal_BC, [bias.shape[0] for _, bias in self._layers[few:]], 1)
        back = signal_BC.new_zeros(0)
        for (weight, _), moved, part in zip(self._layers[few:], self._moved[few:], parts, strict=True):
            if few:
                back = part @ weight if not back.numel() else back.addmm_(part, weight)
            self._accumulate(moved, part, features_BF, scale)
        return back

    def _accumulate(self, moved: Layer, signal_BF: Tensor, inputs_BD: Tensor, scale: float) -> None:
        """Add a layer's gradient, times ``scale``, to its weights or velocity; the old weights are not used again."""
        weight, bias = moved
        if self._velocity is None and self._weight_decay:
            weight.mul_(1.0 - self._lr * self._weight_decay)
            bias.mul_(1.0 - self._lr * self._weight_decay)
        weight.addmm_(signal_BF.t(), inputs_BD, alpha=scale)
        bias.addmv_(signal_BF.t(), signal_BF.new_ones(len(signal_BF)), alpha=scale)


def _views(vector_P: Tensor, ctx: Context, names: tuple[str, str]) -> Layer:
    weight, bias = (ctx.model.spec[name] for name in names)
    return vector_P[weight.start : weight.stop].view(weight.shape), vector_P[bias.start : bias.stop]
