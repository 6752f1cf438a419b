"""CDP: prune the channels that discriminate a class, found by a tf-idf score of channels over classes.

Wang, Guo, Xie, Qi, "Federated Unlearning via Class-Discriminative Pruning", WWW 2022 (arXiv 2110.11794): classes are
documents, channels words, and a channel's activation on a class its frequency. With A[c, h] the mean activation of
channel h on class c, tf = A[c, h] / sum_h A[c, h] and, as commonly implemented, idf = ln(G / (1 + n_h)) where n_h
counts those of the G classes with A[c, h] >= mean_c A[c, h]. Clients send sums of activations by class; recovery rounds
fine-tune. With fewer than three classes no channel has a score above 0.
"""

# N = samples, C = logit columns, G = classes that are scored, H = channels of a layer
from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _NormBase

from clients.unlearners.averaging import summed
from fedcl.contracts.fields import TensorField
from fedcl.contracts.requests import ForgetRequest
from fedcl.contracts.unlearner import Local, Samples, UnlearnContext, Unlearner, UnlearnView
from fedcl.models.flat import FlatModel, Spec

if TYPE_CHECKING:
    from fedcl.contracts.strategy import LocalWork, Target

STEP = "activations"
_FORGET, _RETAIN = "forget", "retain"


class CDP(Unlearner):
    """Silence, in every hidden layer, the channels with the highest score on a forgotten class.

    Channels are those of convolutions and hidden linear layers. A pruned one has its weights and bias set to 0, and the
    scale and shift of the normalisation that follows, so that it puts out 0 whatever comes in. Before a group norm the
    weights stay, because the other channels of the group are normalised by what they put out.

    Parameters
    ----------
    sparsity
        Share of a layer's channels to prune for each forgotten class, in (0, 1), rounded up. A channel whose score is
        not above 0, because it does not discriminate classes, is never pruned.

    Raises
    ------
    ValueError
        In :meth:`check`, if the model has no layer to prune or has attention.
    """

    scopes = frozenset({"class"})

    def __init__(self, *, sparsity: float = 0.1) -> None:
        self.sparsity = sparsity
        self._response: dict[str, TensorField] = {}
        self._metrics: dict[str, float] = {}

    def check(self, model: FlatModel) -> None:
        """Refuse a model without hidden channels, and one whose linear layers make no channels but attention."""
        prunable(model.module)

    def bind(self, work: LocalWork) -> None:
        """Find out for which layers clients send sums, and how many channels each has."""
        model = work.model.copy()
        model.eval()
        with torch.no_grad(), outputs(model.module) as put_out:
            model(torch.zeros(1, *work.input_shape, device=model.device))
        for part in (_FORGET, _RETAIN):  # whoever holds nothing of one leaves it out
            self._response[f"{part}/"] = TensorField(("columns",), "float64", low=0.0, group=part)
            for layer, out in put_out.items():
                self._response[f"{part}/{layer}"] = TensorField(
                    ("columns", out.shape[1]), "float64", low=0.0, group=part
                )

    def local(self, ctx: UnlearnContext, step: str) -> Local:
        """Return, by layer, sums of channels' mean activations by column, separately for forget and retain set."""
        if step != STEP:
            return super().local(ctx, step)
        tensors: dict[str, Tensor] = {}
        for part, samples in ((_FORGET, ctx.forget), (_RETAIN, ctx.retain)):
            if len(samples):
                tensors[f"{part}/"] = torch.bincount(samples.y, minlength=ctx.num_columns).double()
                sums = activation_sums(ctx.model, samples, ctx.num_columns)
                tensors |= {f"{part}/{layer}": value for layer, value in sums.items()}
        return Local(len(ctx.forget) + len(ctx.retain), tensors)

    def unlearn(
        self, requests: Sequence[ForgetRequest], models: Mapping[Target, Tensor], view: UnlearnView
    ) -> dict[Target, Tensor]:
        edited: dict[Target, Tensor] = {}
        pruned = channels = 0
        for target, model in models.items():
            sums = summed(view.ask(STEP, dict.fromkeys(view.clients, model), self._response))
            if f"{_FORGET}/" not in sums:
                continue
            edited[target] = model.clone()
            for layer in (key.removeprefix(f"{_FORGET}/") for key in sums if key.startswith(f"{_FORGET}/")):
                if layer:
                    chosen = self.select(sums, layer)
                    silence(view.spec, edited[target], layer, chosen)
                    pruned, channels = pruned + int(chosen.sum()), channels + len(chosen)
        self._metrics = {"pruned": pruned / max(channels, 1)}
        return edited

    def select(self, sums: Mapping[str, Tensor], layer: str) -> Tensor:
        """Return which channels of a layer to prune, bool (H,)."""
        forgotten = means(sums, _FORGET, layer)
        score_GH = scores(torch.cat([forgotten, means(sums, _RETAIN, layer)]))[: len(forgotten)]
        count = math.ceil(self.sparsity * score_GH.shape[1])
        chosen = torch.zeros(score_GH.shape[1], dtype=torch.bool)
        for score_H in score_GH:
            best = torch.argsort(score_H, descending=True, stable=True)[:count]
            chosen[best[score_H[best] > 0]] = True
        return chosen

    def metrics(self) -> dict[str, float]:
        """Return the pruned share of all channels of the layers looked at."""
        return dict(self._metrics)


def prunable(module: nn.Module) -> dict[str, nn.Module]:
    """Return the convolutions and hidden linear layers of a network, by name.

    Raises
    ------
    ValueError
        If there are none, or the network has attention.
    """
    if any(type(layer).__name__ in ("Attention", "MultiheadAttention") for layer in module.modules()):
        raise ValueError("unlearner=cdp: prunes channels; choose a model without attention")
    heads = ("head.", "heads.", "embed.")
    found: dict[str, nn.Module] = {
        name: layer
        for name, layer in module.named_modules()
        if isinstance(layer, (nn.Conv2d, nn.Linear)) and not f"{name}.".startswith(heads)
    }
    if not found:
        raise ValueError("unlearner=cdp: the model has no hidden layer; set model.hidden or choose another model")
    return found


@torch.no_grad()
def activation_sums(model: FlatModel, samples: Samples, num_columns: int, batch_size: int = 512) -> dict[str, Tensor]:
    """Return, by layer, the sums over samples of channels' activations (C, H), float64.

    An activation is what the layer, and the normalisation that follows it directly, puts out, cut off at 0, mean over
    positions. The name says whose weights and biases silence a channel: ``<layer>``, ``<layer>+<batch norm>`` or
    ``<group norm>``. The model is left in evaluation mode.
    """
    model.eval()
    sums: dict[str, Tensor] = {}
    for batch in samples.batches(batch_size):
        with outputs(model.module) as put_out:
            model(batch.x)
        for layer, out in put_out.items():
            seen = F.relu(out).double()
            means_NH = seen.flatten(2).mean(2) if seen.dim() > 2 else seen
            if layer not in sums:
                sums[layer] = means_NH.new_zeros(num_columns, means_NH.shape[1])
            sums[layer].index_add_(0, batch.y, means_NH)
    return sums


@contextmanager
def outputs(module: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Collect what prunable layers put out in one forward pass, each with the normalisation that took its output."""
    layers = prunable(module)
    norms = {n: layer for n, layer in module.named_modules() if isinstance(layer, (_NormBase, nn.GroupNorm))}
    put_out: dict[str, Tensor] = {}

    def of_layer(name: str) -> Any:
        return lambda _, __, out: put_out.__setitem__(name, out)

    def of_norm(name: str, norm: nn.Module) -> Any:
        def hook(_: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
            taken = next((layer for layer, before in put_out.items() if before is args[0]), None)
            if taken is not None:
                del put_out[taken]
                put_out[name if isinstance(norm, nn.GroupNorm) else f"{taken}+{name}"] = out

        return hook

    hooks = [layer.register_forward_hook(of_layer(name)) for name, layer in layers.items()]
    hooks += [norm.register_forward_hook(of_norm(name, norm)) for name, norm in norms.items()]
    try:
        yield put_out
    finally:
        for hook in hooks:
            hook.remove()


def means(sums: Mapping[str, Tensor], part: str, layer: str) -> Tensor:
    """Return the mean activations (G, H) of the columns of which ``part`` has samples."""
    if f"{part}/" not in sums:
        return torch.empty(0, sums[f"{_FORGET}/{layer}"].shape[1], dtype=torch.float64)
    counts = sums[f"{part}/"]
    there = counts > 0
    return sums[f"{part}/{layer}"][there] / counts[there, None]


def scores(activation_GH: Tensor) -> Tensor:
    """Return tf-idf of each channel for each class (G, H), from mean activations (G, H) >= 0."""
    tf_GH = activation_GH / activation_GH.sum(1, keepdim=True).clamp_min(1e-300)
    active_H = (activation_GH >= activation_GH.mean(0)).sum(0)
    return tf_GH * torch.log(len(activation_GH) / (1.0 + active_H))


def silence(spec: Spec, vector: Tensor, layer: str, chosen_H: Tensor) -> None:
    """Set the weights and biases of the channels ``chosen_H`` (bool) of what ``layer`` names to 0, in place."""
    for owner in layer.split("+"):
        for name in (f"{owner}.weight", f"{owner}.bias"):
            if name in spec:
                spec.view(vector, name)[chosen_H] = 0.0
