"""Many clients trained together: their models are stacked, and one step moves all of them.

A step on a small model costs its calls, not its arithmetic; the clients of a stack share the calls. Plain linear
networks take the written-out steps of `fedcl.client.fused`, as batched products; others are differentiated once for
all clients (``torch.func``). Each client gets the batches that the loop would give it, in the same order.
"""

# K = clients of the stack, B = batch, C = logit columns, D = a layer's inputs, F = its outputs
from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as functional
from torch import Tensor
from torch.func import functional_call, grad_and_value, vmap

from fedcl.client.loop import summary
from fedcl.client.moves import num_steps
from fedcl.client.stacked_batches import StackedBatches
from fedcl.client.stacked_moves import StackedMoves
from fedcl.contracts.learner import Context, LocalTraining
from fedcl.evaluation.predictions import masked
from fedcl.models.chain import Chain, Names, chain_of
from fedcl.models.flat import Spec, TensorSpec

ALIGN = 16  # float32 numbers: 64 bytes, as wide as the widest vector registers and a cache line


def fit_stacked(
    ctxs: Sequence[Context], starts: Sequence[Tensor], training: LocalTraining
) -> list[tuple[Tensor, dict[str, float]]]:
    """Train the clients of ``ctxs`` together, each on its own samples of one task.

    Parameters
    ----------
    ctxs
        The clients' contexts, all with the same model.
    starts
        The weights (P,) that each client starts from.
    training
        How they train; the learning rate is that of each context.

    Returns
    -------
    list
        For each context its trained model (P,) and what `fedcl.client.loop.fit` reports.
    """
    lengths = [num_steps(len(ctx.data), training) for ctx in ctxs]
    # the longest first: clients without a batch left are at the end, and the others are a slice
    places = sorted(range(len(ctxs)), key=lambda k: (-lengths[k], k))
    chosen = [ctxs[k] for k in places]
    steps = _steps(chosen, _stacked([starts[k] for k in places]), training)
    batches = StackedBatches(chosen, training, steps.width)
    losses = torch.zeros(len(chosen), max(lengths), device=chosen[0].device)
    for number in range(max(lengths)):
        for part, size, lr in batches.parts(number):
            losses[part, number] = steps.step(part, *batches.take(part, number, size), number, lr)
    rows = zip(losses.tolist(), places, strict=True)
    reports = [summary(row[: lengths[k]], training.epochs * len(ctxs[k].data)) for row, k in rows]
    trained = dict(zip(places, zip(steps.vectors(), reports, strict=True), strict=True))
    for ctx, length in zip(ctxs, lengths, strict=True):
        ctx.step = length
    return [trained[place] for place in range(len(ctxs))]


def _stacked(vectors: Sequence[Tensor]) -> Tensor:
    """Return vectors as the rows of one read-only tensor, without a copy if all are the same."""
    first = vectors[0]
    if all(vector is first for vector in vectors):
        return first.expand(len(vectors), -1)
    return torch.stack(list(vectors))


def _steps(ctxs: Sequence[Context], starts_KP: Tensor, training: LocalTraining) -> _Linear | _Differentiated:
    model = ctxs[0].model
    model.train()
    chain = chain_of(model.module)
    if chain is None:
        return _Differentiated(ctxs, starts_KP, training)
    return _Linear(ctxs, starts_KP, chain, training)


def _view(vectors_KP: Tensor, tensor: TensorSpec) -> Tensor:
    """Return the tensor for every client, (K, *shape), in the same memory."""
    return vectors_KP[:, tensor.start : tensor.stop].view(-1, *tensor.shape)


class _Linear:
    """Written-out steps on plain linear networks: those of `fedcl.client.fused.FusedStep`, for many at once.

    All heads are one layer here. Every width is rounded up to `ALIGN`, with weights that stay zero and logits of minus
    infinity. So all clients' matrices are aligned alike in memory, and a client's products have the same bits at every
    place of a stack.
    """

    def __init__(self, ctxs: Sequence[Context], starts_KP: Tensor, chain: Chain, training: LocalTraining) -> None:
        self._training, self._dropout, self._spec = training, chain.dropout, ctxs[0].model.spec
        self._names = [(names,) for names in chain.hidden] + [chain.heads]
        self._layers = [_joined(starts_KP, self._spec, names) for names in self._names]
        self.width: int | None = self._layers[0][0].shape[2]
        self._moves = StackedMoves.of([tensor for layer in self._layers for tensor in layer], training)
        self._velocity = [(torch.zeros_like(w), torch.zeros_like(b)) for w, b in self._layers if training.momentum]
        self._generators = [ctx.rng("dropout") for ctx in ctxs] if any(chain.dropout) else []
        columns = sum(self._spec[bias].size for _, bias in chain.heads)
        refused = torch.ones(self._layers[-1][1].shape[2], dtype=torch.bool, device=starts_KP.device)
        refused[:columns] = False if ctxs[0].mask is None else ~ctxs[0].mask
        self._refused = refused if bool(refused.any()) else None
        self._by_batch = ctxs[0].task.by_batch

    @torch.inference_mode()
    def step(self, part: slice, x: Tensor, y: Tensor, number: int, lr: float) -> Tensor:
        """Move the models of ``part`` by a step on x (K, B, D), y (K, B); return their losses before it, (K,)."""
        layers = [(weight[part], bias[part]) for weight, bias in self._layers]
        inputs = [x]
        kept: list[Tensor | None] = []
        for (weight, bias), p in zip(layers[:-1], self._dropout, strict=True):
            h = torch.baddbmm(bias, inputs[-1], weight.mT).relu_()
            kept.append(self._drop(h, p, part, len(kept)))
            inputs.append(h)
        logits = torch.baddbmm(layers[-1][1], inputs[-1], layers[-1][0].mT)
        if self._by_batch:  # a target is never refused, so that these are all
            absent = torch.ones_like(logits[:, 0], dtype=torch.bool).scatter_(1, y, False)
            logits.masked_fill_(absent.unsqueeze(1), float("-inf"))
        elif self._refused is not None:
            logits.masked_fill_(self._refused, float("-inf"))
        log_p, target = torch.log_softmax(logits, 2), y.unsqueeze(2)
        losses = -log_p.gather(2, target).mean((1, 2))
        # softmax again, not exp: it works row by row, and a row's bits do not depend on its place
        signal = torch.softmax(logits, 2).scatter_add_(2, target, log_p.new_full(target.shape, -1.0))
        grads: list[Tensor] = []
        for k in reversed(range(len(layers))):
            back = torch.bmm(signal, layers[k][0]) if k else signal
            if self._moves is None:
                self._move(k, part, signal, inputs[k], lr)
            else:
                grads[:0] = [torch.bmm(left, right) / len(x[0]) for left, right in _products(signal, inputs[k])]
            if k:
                mask = kept[k - 1]
                signal = torch.ops.aten.threshold_backward(back if mask is None else back.mul_(mask), inputs[k], 0.0)
        if self._moves is not None:
            self._moves.step(part, grads, number, lr)
        return losses

    def vectors(self) -> Tensor:
        """Return the models (K, P)."""
        first = self._layers[0][0]
        vectors_KP = torch.empty(len(first), self._spec.size, device=first.device)
        for names, (weight, bias) in zip(self._names, self._layers, strict=True):
            row = 0
            for weight_name, bias_name in names:
                rows, columns = self._spec[weight_name].shape
                _view(vectors_KP, self._spec[weight_name]).copy_(weight[:, row : row + rows, :columns])
                _view(vectors_KP, self._spec[bias_name]).copy_(bias[:, 0, row : row + rows])
                row += rows
        return vectors_KP

    def _drop(self, h_KBF: Tensor, p: float, part: slice, k: int) -> Tensor | None:
        """Drop entries in place as each client's k-th layer would, and return the factors."""
        if not p:
            return None
        width = self._spec[self._names[k][0][1]].size
        drawn = [torch.rand(h_KBF.shape[1], width, generator=generator) for generator in self._generators[part]]
        mask = (torch.stack(drawn) >= p).to(h_KBF.device, h_KBF.dtype) / (1.0 - p)
        mask = functional.pad(mask, (0, h_KBF.shape[2] - width))
        h_KBF.mul_(mask)
        return mask

    def _move(self, k: int, part: slice, signal_KBF: Tensor, inputs_KBD: Tensor, lr: float) -> None:
        """Move layer k by its gradient; its old weights are not used again."""
        training, scale = self._training, 1.0 / signal_KBF.shape[1]
        for i, (left, right) in enumerate(_products(signal_KBF, inputs_KBD)):
            weight = self._layers[k][i][part]
            if training.momentum:
                moved = self._velocity[k][i][part].mul_(training.momentum)
                if training.weight_decay:
                    moved.add_(weight, alpha=training.weight_decay)
                weight.sub_(moved.baddbmm_(left, right, alpha=scale), alpha=lr)
                continue
            if training.weight_decay:
                weight.mul_(1.0 - lr * training.weight_decay)
            weight.baddbmm_(left, right, alpha=-lr * scale)


def _products(signal_KBF: Tensor, inputs_KBD: Tensor) -> tuple[tuple[Tensor, Tensor], ...]:
    """Return the factors of a layer's gradients, summed over the batch: of its weight (K, F, D) and bias (K, 1, F)."""
    clients, batch, _ = signal_KBF.shape
    ones = signal_KBF.new_ones(clients, 1, _aligned(batch))[..., :batch]
    return (signal_KBF.mT, inputs_KBD), (ones, signal_KBF)


def _joined(vectors_KP: Tensor, spec: Spec, names: Sequence[Names]) -> tuple[Tensor, Tensor]:
    """Return the layers ``names``, which share their inputs, as one: weight (K, F, D) and bias (K, 1, F), aligned."""
    rows, inputs = sum(spec[bias].size for _, bias in names), spec[names[0][0]].shape[1]
    weight = vectors_KP.new_zeros(len(vectors_KP), _aligned(rows), _aligned(inputs))
    bias = vectors_KP.new_zeros(len(vectors_KP), 1, _aligned(rows))
    row = 0
    for weight_name, bias_name in names:
        part = slice(row, row + spec[bias_name].size)
        weight[:, part, :inputs] = _view(vectors_KP, spec[weight_name])
        bias[:, 0, part] = _view(vectors_KP, spec[bias_name])
        row = part.stop
    return weight, bias


def _aligned(width: int) -> int:
    return -(-width // ALIGN) * ALIGN


class _Differentiated:
    """Steps on any network that ``torch.func`` can differentiate for many weights at once."""

    def __init__(self, ctxs: Sequence[Context], starts_KP: Tensor, training: LocalTraining) -> None:
        self._model, self._training, self._mask = ctxs[0].model, training, ctxs[0].mask
        self._by_batch = ctxs[0].task.by_batch
        whole = torch.contiguous_format
        self._params = {t.name: _view(starts_KP, t).clone(memory_format=whole) for t in self._model.spec}
        self.width: int | None = None
        self._velocity: dict[str, Tensor] = {}
        self._moves = StackedMoves.of(list(self._params.values()), training)
        self._gradient = vmap(grad_and_value(self._loss))

    def _loss(self, params: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        logits = functional_call(self._model.module, params, (x,)).logits
        mask = self._mask
        if self._by_batch:  # a target is never masked, so that these are all
            mask = (y.unsqueeze(1) == torch.arange(logits.shape[1], device=y.device)).any(0)
        return functional.cross_entropy(masked(logits, mask), y)

    def step(self, part: slice, x: Tensor, y: Tensor, number: int, lr: float) -> Tensor:
        params = {name: stacked[part] for name, stacked in self._params.items()}
        grads, losses = self._gradient(params, x, y)
        if self._moves is not None:
            self._moves.step(part, [grads[name] for name in self._params], number, lr)
            return cast(Tensor, losses.detach())
        with torch.no_grad():
            for name, weight in params.items():
                self._move(name, part, weight, grads[name], lr)
        return cast(Tensor, losses.detach())

    def _move(self, name: str, part: slice, weight: Tensor, gradient: Tensor, lr: float) -> None:
        training = self._training
        if training.weight_decay:
            gradient = gradient.add(weight, alpha=training.weight_decay)
        if training.momentum:
            if name not in self._velocity:
                self._velocity[name] = torch.zeros_like(self._params[name])
            gradient = self._velocity[name][part].mul_(training.momentum).add_(gradient)
        weight.sub_(gradient, alpha=lr)

    def vectors(self) -> Tensor:
        spec, clients = self._model.spec, len(next(iter(self._params.values())))
        vectors_KP = torch.empty(clients, spec.size, device=self._model.device)
        for name, stacked in self._params.items():
            _view(vectors_KP, spec[name]).copy_(stacked)
        return vectors_KP
