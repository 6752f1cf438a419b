"""A replay buffer: contiguous tensors, filled by reservoir sampling."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fedcl.client.plugin import State

# M = budget in samples, B = batch, C = logit columns


class Replayed(NamedTuple):
    """Samples out of a buffer: inputs (B, ...), target columns (B,), and the task each was met in (B,).

    ``logits`` (B, C) are what a model once answered, where they were given; a buffer holds them for all or for none.
    """

    x: Tensor
    y: Tensor
    task: Tensor
    logits: Tensor | None = None

    def map(self, fn: Callable[[Tensor], Tensor]) -> Replayed:
        """Return the samples with ``fn`` done to each tensor there is."""
        return Replayed(fn(self.x), fn(self.y), fn(self.task), None if self.logits is None else fn(self.logits))

    @property
    def tensors(self) -> list[Tensor]:
        """The tensors there are."""
        return [tensor for tensor in self if tensor is not None]


class ReplayBuffer:
    """At most ``budget`` samples, a uniform random subset of all that were ever added.

    Reservoir sampling (Vitter 1985, algorithm R): the k-th sample (from 0) is kept as long as there is room; after that
    it draws a slot j uniformly from 0..k and replaces the sample there if j < budget. Samples live on the device of the
    first that is added; memory grows with what is kept, not with the budget.

    Raises
    ------
    ValueError
        If the budget is negative.
    """

    def __init__(self, budget: int) -> None:
        if budget < 0:
            raise ValueError(f"budget={budget}: must be >= 0")
        self.budget = budget
        self.seen = 0
        self._rows: Replayed | None = None

    def __len__(self) -> int:
        return min(self.seen, self.budget)

    def add(self, x: Tensor, y: Tensor, task: int, generator: torch.Generator, logits: Tensor | None = None) -> None:
        """Show a batch x (B, ...), y (B,), logits (B, C) of ``task`` to the reservoir; ``generator`` is on the CPU."""
        if not self.budget or not len(y):
            return
        rows = Replayed(x, y, torch.full_like(y, task), logits)
        room = min(len(y), self.budget - len(self))
        if room:
            self._append(rows.map(lambda tensor: tensor[:room]))
        late = len(y) - room
        if late:
            arrival = torch.arange(self.seen + room, self.seen + len(y), dtype=torch.float64)
            slots = (torch.rand(late, generator=generator, dtype=torch.float64) * (arrival + 1)).long()
            self._replace(slots, rows.map(lambda tensor: tensor[room:]))
        self.seen += len(y)

    def sample(self, count: int, generator: torch.Generator) -> Replayed:
        """Return ``count`` different samples, or all if there are fewer.

        Raises
        ------
        ValueError
            If the buffer is empty.
        """
        if self._rows is None:
            raise ValueError("an empty buffer has no samples to give")
        chosen = torch.randperm(len(self), generator=generator)[:count].to(self._rows.y.device)
        return self._rows.map(lambda tensor: tensor.index_select(0, chosen))

    def rewrite_logits(self, task: int, answer: Callable[[Tensor], Tensor]) -> None:
        """Replace the logits of the samples of ``task`` with ``answer(x)`` (B, C); nothing where none are held."""
        if self._rows is None or self._rows.logits is None:
            return
        chosen = torch.nonzero(self._rows.task[: len(self)] == task).squeeze(1)
        if len(chosen):
            self._rows.logits[chosen] = answer(self._rows.x[chosen])

    def state(self) -> State:
        """Return the samples and the count of the stream."""
        if self._rows is None:
            return {}
        rows = self._rows.map(lambda tensor: tensor[: len(self)])
        state: State = {"x": rows.x, "y": rows.y, "task": rows.task, "seen": self.seen}
        return state if rows.logits is None else {**state, "logits": rows.logits}

    def load(self, state: State) -> None:
        """Restore what :meth:`state` returned; the tensors become the buffer's own and will be written to."""
        self.seen = state.get("seen", 0)
        self._rows = Replayed(state["x"], state["y"], state["task"], state.get("logits")) if state else None

    def _append(self, rows: Replayed) -> None:
        start, stop = len(self), len(self) + len(rows.y)
        if self._rows is None or len(self._rows.y) < stop:
            held = 0 if self._rows is None else len(self._rows.y)
            length = min(self.budget, max(stop, 2 * held))
            grown = rows.map(lambda tensor: tensor.new_empty((length, *tensor.shape[1:])))
            if self._rows is not None:
                for new, old in zip(grown.tensors, self._rows.tensors, strict=True):
                    new[:start] = old[:start]
            self._rows = grown
        for kept, tensor in zip(self._rows.tensors, rows.tensors, strict=True):
            kept[start:stop] = tensor

    def _replace(self, slots: Tensor, rows: Replayed) -> None:
        """Write row i to ``slots[i]``; where several rows drew one slot the last stays, as it does one at a time."""
        assert self._rows is not None
        inside = torch.nonzero(slots < self.budget).squeeze(1)
        winner = torch.full((self.budget,), -1).scatter_reduce_(0, slots[inside], inside, "amax")
        taken = torch.nonzero(winner >= 0).squeeze(1)
        device = rows.y.device
        target, source = taken.to(device), winner[taken].to(device)
        for kept, tensor in zip(self._rows.tensors, rows.tensors, strict=True):
            kept[target] = tensor[source]
