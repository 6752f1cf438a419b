"""GDumb: keep a class-balanced memory greedily, and train on nothing else.

Prabhu, Torr and Dokania, "GDumb: A Simple Approach that Questions Our Progress in Continual Learning", ECCV 2020,
Algorithm 1 (greedy balancing sampler): with budget k and C classes seen, a sample is taken if its class has fewer than
k / C samples in memory; where memory is full, it takes the place of a random sample of the largest class.
"""

from __future__ import annotations

import torch

from clients.learners.replay import Replay
from fedcl.contracts.learner import Batch, Context

# M = samples in memory, C = logit columns, T = tasks


class GDumb(Replay):
    """Train every step on a batch from a class-balanced memory, in place of the incoming one.

    ``budget`` is that of :class:`~fedcl.client.buffer.ReplayBuffer`. The stream that fills memory counts each sample
    once, in the client's first local round of a task. With a budget of 0 the incoming batches stay.
    """

    key = "learner.gdumb"

    def __init__(self, *, budget: int | str = 200) -> None:
        super().__init__(budget=budget)

    def before_task(self, ctx: Context) -> None:
        """Offer the new task's samples to memory, in random order."""
        if not self._buffer.enabled or not len(ctx.data):
            return
        order = torch.randperm(len(ctx.data), generator=ctx.rng("arrival")).to(ctx.device)
        rows = {name: tensor[order] for name, tensor in self._buffer.rows_of(ctx).items()}
        held = self._buffer.held["y"].tolist() if len(self._buffer) else []
        chosen = balanced(held, rows["y"].tolist(), self._buffer.capacity(rows), ctx.rng("balance"))
        self._buffer.keep(torch.tensor(chosen, device=ctx.device), rows)
        self._buffer.seen += len(ctx.data)

    def before_step(self, ctx: Context, batch: Batch) -> Batch:
        """Return as many samples of memory as the batch has, or all there are."""
        if not len(self._buffer):
            return batch
        return self.replayed(ctx, self._buffer.draw(ctx, len(batch.y)))


def balanced(held: list[int], arriving: list[int], budget: int, generator: torch.Generator) -> list[int]:
    """Return which samples stay: positions in ``held`` followed by ``arriving``, both given as targets."""
    kept: dict[int, list[int]] = {}
    for position, target in enumerate(held):
        kept.setdefault(target, []).append(position)
    total = len(held)
    for position, target in enumerate(arriving, start=len(held)):
        classes = len(kept) + (target not in kept)
        mine = kept.setdefault(target, [])
        if len(mine) * classes >= budget:
            continue
        if total == budget:
            largest = max(kept.values(), key=len)
            largest.pop(int(torch.randint(len(largest), (1,), generator=generator)))
        else:
            total += 1
        mine.append(position)
    return sorted(position for positions in kept.values() for position in positions)
