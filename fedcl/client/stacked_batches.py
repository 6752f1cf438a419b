"""The batches of clients that are trained together."""

# K = clients of the stack, B = batch
from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence

from fedcl.client.moves import num_steps
from fedcl.contracts.learner import Context, LocalTraining

WINDOW_BYTES = 1 << 25  # of samples, gathered at once for all clients of a stack


class StackedBatches:
    """The batches of K clients, drawn as the loop draws them, gathered for a window of steps at a time.

    ``width`` is the length to which flat samples are padded with zeros; None leaves samples as they are.
    """

    def __init__(self, ctxs: Sequence[Context], training: LocalTraining, width: int | None) -> None:
        self._batch, self._sizes, self._lrs = training.batch_size, [len(c.data) for c in ctxs], [c.lr for c in ctxs]
        self._lengths = [num_steps(size, training) for size in self._sizes]
        self._alike = len(set(self._sizes)) == 1 and len(set(self._lrs)) == 1
        self._x = [ctx.data.x if width is None else ctx.data.x.flatten(1) for ctx in ctxs]
        self._rows = [_rows(ctx, training) for ctx in ctxs]
        targets = [ctx.data.y[rows] for ctx, rows in zip(ctxs, self._rows, strict=True)]
        self._y = pad_sequence(targets, batch_first=True)
        self._shape = self._x[0].shape[1:] if width is None else torch.Size([width])
        sample = 4 * self._shape.numel() * len(ctxs) * training.batch_size
        self._window = max(1, WINDOW_BYTES // max(sample, 1)) * training.batch_size
        self._start, self._held = -1, torch.empty(0)

    def parts(self, number: int) -> Iterator[tuple[slice, int, float]]:
        """Yield the clients that take step ``number``, grouped by equal batch sizes and learning rates."""
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

    def take(self, part: slice, number: int, size: int) -> tuple[Tensor, Tensor]:
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
    """Return the positions of a client's samples for all its steps, each epoch padded to whole batches."""
    generator, size = ctx.rng("batches"), len(ctx.data)
    missing = -size % training.batch_size
    orders = [torch.randperm(size, generator=generator) for _ in range(training.epochs)]
    filled = [pad(order, (0, missing)) if missing else order for order in orders]
    return (torch.cat(filled) if len(filled) > 1 else filled[0]).to(ctx.device)
