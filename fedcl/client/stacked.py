"""Many clients at once: their models stacked, a step of all of them in one go.

A step on a small model costs its calls, not its arithmetic; sixteen clients in one step share them. Plain linear
networks take the written-out steps of `fedcl.client.fused`, as batched products; others are differentiated once for
all clients (``torch.func``). Each client sees the batches that the loop would give it, in the same order.
"""

# K = clients of the stack, B = batch, C = logit columns, D = a layer's inputs, F = its outputs
from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Protocol, cast

import torch
import torch.nn.functional as functional
from torch import Tensor
from torch.func import functional_call, grad_and_value, vmap

from fedcl.client.loop import summary
from fedcl.contracts.learner import Context, LocalTraining
from fedcl.models.chain import Chain, Names, chain_of
from fedcl.models.flat import Spec, TensorSpec

WINDOW_BYTES = 1 << 25  # of samples, gathered at once for all clients of a stack
ALIGN = 16  # float32 numbers: 64 bytes, the width of the widest vector registers and of a cache line
Samples = tuple[Tensor, Tensor]


class Steps(Protocol):
    """Models of K clients; a step moves those of a slice. ``width`` is how long flat samples must be, or None."""

    width: int | None

    def step(self, part: slice, x: Tensor, y: Tensor, lr: float) -> Tensor:
        """Move the models of ``part`` by a step on x (K, B, ...), y (K, B); return their losses before, (K,)."""
        ...

    def vectors(self) -> Tensor:
        """Return the models (K, P)."""
        ...


def fit_stacked(
    ctxs: Sequence[Context], starts: Sequence[Tensor], training: LocalTraining
) -> list[tuple[Tensor, dict[str, float]]]:
    """Train the clients of ``ctxs`` together, each on its own samples of one task.

    Parameters
    ----------
    ctxs
        The visits, of one model.
    starts
        The weights (P,) that each client starts from.
    training
        How they train, but for the learning rate, which each visit has for itself.

    Returns
    -------
    list
        For each context its trained model (P,) and what `fedcl.client.loop.fit` reports.
    """
    lengths = [_num_steps(len(ctx.data), training) for ctx in ctxs]
    # the longest first: who has no batch left is at the end, and the others are a slice
    places = sorted(range(len(ctxs)), key=lambda k: (-lengths[k], k))
    chosen = [ctxs[k] for k in places]
    steps = _steps(chosen, _stacked([starts[k] for k in places]), training)
    batches = _Batches(chosen, training, steps.width)
    losses = torch.zeros(len(chosen), max(lengths), device=chosen[0].device)
    for number in range(max(lengths)):
        for part, size, lr in batches.parts(number):
            losses[part, number] = steps.step(part, *batches.take(part, number, size), lr)
    seen = zip(losses.tolist(), places, strict=True)
    reports = [summary(row[: lengths[k]], training.epochs * len(ctxs[k].data)) for row, k in seen]
    trained = dict(zip(places, zip(steps.vectors(), reports, strict=True), strict=True))
    for ctx, length in zip(ctxs, lengths, strict=True):
        ctx.step = length
    return [trained[place] for place in range(len(ctxs))]


def _stacked(vectors: Sequence[Tensor]) -> Tensor:
    """Return vectors as the rows of one tensor, to be read only: without a copy where all are the same."""
    first = vectors[0]
    if all(vector is first for vector in vectors):
        return first.expand(len(vectors), -1)
    return torch.stack(list(vectors))


def _steps(ctxs: Sequence[Context], starts_KP: Tensor, training: LocalTraining) -> Steps:
    model = ctxs[0].model
    model.train()
    chain = chain_of(model.module)
    if chain is None:
        return _Differentiated(ctxs, starts_KP, training)
    return _Linear(ctxs, starts_KP, chain, training)


def _num_steps(size: int, training: LocalTraining) -> int:
    return training.epochs * -(-size // training.batch_size)


class _Batches:
    """The batches of K clients, drawn as the loop draws them, gathered a window of steps at a time.

    ``width`` rounds the length of flat samples up with zeros; None leaves samples as they are.
    """

    def __init__(self, ctxs: Sequence[Context], training: LocalTraining, width: int | None) -> None:
        self._batch, self._sizes, self._lrs = training.batch_size, [len(c.data) for c in ctxs], [c.lr for c in ctxs]
        self._lengths = [_num_steps(size, training) for size in self._sizes]
        self._alike = len(set(self._sizes)) == 1 and len(set(self._lrs)) == 1
        self._x = [ctx.data.x if width is None else ctx.data.x.flatten(1) for ctx in ctxs]
        self._rows = [_rows(ctx, training) for ctx in ctxs]
        self._y = _side_by_side([ctx.data.y[rows] for ctx, rows in zip(ctxs, self._rows, strict=True)])
        self._shape = self._x[0].shape[1:] if width is None else torch.Size([width])
        sample = 4 * self._shape.numel() * len(ctxs) * training.batch_size
        self._window = max(1, WINDOW_BYTES // max(sample, 1)) * training.batch_size
        self._start, self._held = -1, torch.empty(0)

    def parts(self, number: int) -> Iterator[tuple[slice, int, float]]:
        """Yield the clients that take step ``number``, those together whose batches and learning rates are alike."""
        if self._alike:
            yield slice(0, len(self._sizes)), self._size(0, number), self._lrs[0]
            return
        active = [k for k, length in enumerate(self._lengths) if length > number]
        for (size, lr), run in groupby(active, key=lambda k: (self._size(k, number), self._lrs[k])):
            members = list(run)
            yield slice(members[0], members[-1] + 1), size, lr

    def _size(self, k: int, number: int) -> int:
        """Return how many samples client k's batch of step ``number`` has."""
        per_epoch = -(-self._sizes[k] // self._batch)
        return min(self._batch, self._sizes[k] - number % per_epoch * self._batch)

    def take(self, part: slice, number: int, size: int) -> Samples:
        """Return x (K, B, ...) and y (K, B) of a step of the clients ``part``, whose batches have ``size`` samples."""
        place = number * self._batch
        start = place - place % self._window
        if start != self._start:
            self._gather(start)
        here = place - start
        return self._held[part, here : here + size], self._y[part, place : place + size]

    def _gather(self, start: int) -> None:
        rows = [rows[start : start + self._window] for rows in self._rows]
        shortest, longest = min(map(len, rows)), max(map(len, rows))
        full = shortest == longest and self._x[0].shape[1:] == self._shape
        make = self._x[0].new_empty if full else self._x[0].new_zeros
        self._start, self._held = start, make(len(rows), longest, *self._shape)
        for k, own in enumerate(rows):
            if full:
                torch.index_select(self._x[k], 0, own, out=self._held[k])
            else:
                self._held[k, : len(own), : self._x[k].shape[1]].copy_(self._x[k][own])


def _rows(ctx: Context, training: LocalTraining) -> Tensor:
    """Return the positions of a client's samples for all its steps, each epoch filled up to whole batches."""
    generator, size = ctx.rng("batches"), len(ctx.data)
    missing = -size % training.batch_size
    orders = [torch.randperm(size, generator=generator) for _ in range(training.epochs)]
    filled = [functional.pad(order, (0, missing)) if missing else order for order in orders]
    return (torch.cat(filled) if len(filled) > 1 else filled[0]).to(ctx.device)


def _side_by_side(rows: Sequence[Tensor]) -> Tensor:
    """Return vectors of perhaps unequal length as the rows of one tensor, filled up with zeros."""
    return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True)


def _view(vectors_KP: Tensor, tensor: TensorSpec) -> Tensor:
    """Return the tensor for every client, (K, *shape), in the same memory."""
    return vectors_KP[:, tensor.start : tensor.stop].view(-1, *tensor.shape)


class _Linear:
    """Written-out steps on plain linear networks: those of `fedcl.client.fused.FusedStep`, for many at once.

    All heads are one layer here. Every width is rounded up to `ALIGN`, with weights that are and stay zero, and logits
    that are minus infinity: so each client's matrices lie alike in memory, and the products have the same bits wherever
    in a stack it stands.
    """

    def __init__(self, ctxs: Sequence[Context], starts_KP: Tensor, chain: Chain, training: LocalTraining) -> None:
        self._training, self._dropout, self._spec = training, chain.dropout, ctxs[0].model.spec
        self._names = [(names,) for names in chain.hidden] + [chain.heads]
        self._layers = [_joined(starts_KP, self._spec, names) for names in self._names]
        self.width: int | None = self._layers[0][0].shape[2]
        self._velocity = [(torch.zeros_like(w), torch.zeros_like(b)) for w, b in self._layers if training.momentum]
        self._generators = [ctx.rng("dropout") for ctx in ctxs] if any(chain.dropout) else []
        columns = sum(self._spec[bias].size for _, bias in chain.heads)
        refused = torch.ones(self._layers[-1][1].shape[2], dtype=torch.bool, device=starts_KP.device)
        refused[:columns] = False if ctxs[0].mask is None else ~ctxs[0].mask
        self._refused = refused if bool(refused.any()) else None

    @torch.inference_mode()
    def step(self, part: slice, x: Tensor, y: Tensor, lr: float) -> Tensor:
        layers = [(weight[part], bias[part]) for weight, bias in self._layers]
        inputs = [x]
        kept: list[Tensor | None] = []
        for (weight, bias), p in zip(layers[:-1], self._dropout, strict=True):
            h = torch.baddbmm(bias, inputs[-1], weight.mT).relu_()
            kept.append(self._drop(h, p, part, len(kept)))
            inputs.append(h)
        logits = torch.baddbmm(layers[-1][1], inputs[-1], layers[-1][0].mT)
        if self._refused is not None:
            logits.masked_fill_(self._refused, float("-inf"))
        log_p, target = torch.log_softmax(logits, 2), y.unsqueeze(2)
        losses = -log_p.gather(2, target).mean((1, 2))
        # softmax again and not exp: it works row by row, and a row's bits do not depend on where it stands
        signal = torch.softmax(logits, 2).scatter_add_(2, target, log_p.new_full(target.shape, -1.0))
        for k in reversed(range(len(layers))):
            back = torch.bmm(signal, layers[k][0]) if k else signal
            self._move(k, part, signal, inputs[k], lr)
            if k:
                mask = kept[k - 1]
                signal = torch.ops.aten.threshold_backward(back if mask is None else back.mul_(mask), inputs[k], 0.0)
        return losses

    def vectors(self) -> Tensor:
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
        """Drop entries in place as each client's k-th layer would, and return what they were multiplied by."""
        if not p:
            return None
        width = self._spec[self._names[k][0][1]].size
        drawn = [torch.rand(h_KBF.shape[1], width, generator=generator) for generator in self._generators[part]]
        mask = (torch.stack(drawn) >= p).to(h_KBF.device, h_KBF.dtype) / (1.0 - p)
        mask = functional.pad(mask, (0, h_KBF.shape[2] - width))
        h_KBF.mul_(mask)
        return mask

    def _move(self, k: int, part: slice, signal_KBF: Tensor, inputs_KBD: Tensor, lr: float) -> None:
        """Move layer k by its gradient; its weights are no longer needed as they were."""
        training = self._training
        clients, batch, _ = signal_KBF.shape
        scale = 1.0 / batch
        ones = signal_KBF.new_ones(clients, 1, _aligned(batch))[..., :batch]
        pairs = ((signal_KBF.mT, inputs_KBD), (ones, signal_KBF))
        for i, (left, right) in enumerate(pairs):
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
        whole = torch.contiguous_format
        self._params = {t.name: _view(starts_KP, t).clone(memory_format=whole) for t in self._model.spec}
        named = dict(self._model.module.named_parameters())
        self._trained = [name for name in self._params if named[name].requires_grad]
        self.width: int | None = None
        self._velocity: dict[str, Tensor] = {}
        self._gradient = vmap(grad_and_value(self._loss))

    def _loss(self, trained: dict[str, Tensor], fixed: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        logits = functional_call(self._model.module, {**fixed, **trained}, (x,)).logits
        if self._mask is not None:
            logits = logits.masked_fill(~self._mask, float("-inf"))
        return functional.cross_entropy(logits, y)

    def step(self, part: slice, x: Tensor, y: Tensor, lr: float) -> Tensor:
        params = {name: stacked[part] for name, stacked in self._params.items()}
        trained = {name: params.pop(name) for name in self._trained}
        grads, losses = self._gradient(trained, params, x, y)
        with torch.no_grad():
            for name, weight in trained.items():
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
