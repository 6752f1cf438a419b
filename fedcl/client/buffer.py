"""A replay buffer: contiguous tensors, samples in the form they are stored in, filled by a policy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from fedcl.client.policies import Budget, ClassTally, Policy, check_policy, exemplars, uniform_slots
from fedcl.client.rows import Rows, among, grown, shown
from fedcl.contracts.learner import Batch, Context, Restore, State

# M = samples held, B = batch, C = logit columns, F = features
# columns: x as held, y, task; logits if given; shown, x in the form that the model reads, once it is computed
_BATCH = 256


class Replayed(NamedTuple):
    """Samples of a buffer: inputs (B, ...), target columns (B,), and each sample's task (B,).

    ``logits`` (B, C) are stored outputs of a model; a buffer holds them for all samples or for none.
    """

    x: Tensor
    y: Tensor
    task: Tensor
    logits: Tensor | None = None


class ReplayBuffer:
    """At most ``budget`` samples: ``200`` of them, or as many as fit into ``"64KB"``.

    Samples that are given with their ``raw`` uint8 form are held in it, in a quarter of the memory; the form that the
    model reads is restored from it, bit for bit, once per message and only if samples are drawn. Others are held as
    given. Memory grows with the samples kept, not with the budget, and is on the device of the first sample.

    Parameters
    ----------
    budget
        Samples, or bytes of samples as they are held, with label, task and logits (:meth:`Budget.of`).
    policy
        ``reservoir``: a uniform random subset of all that were ever added (Vitter 1985, algorithm R). The k-th sample
        (from 0) is kept while there is room; then it draws a slot j from 0..k and replaces the sample there if
        j < budget. ``class_balanced``: an equal share for every class (:class:`ClassTally`). ``herding``: at a task's
        end, of every class the samples that keep its mean in the model's features (:func:`herd`), with an equal share
        for every class of every task; nothing is kept before.
    at
        The configuration key of these settings, for messages: ``learner.er``.

    Raises
    ------
    ValueError
        For an invalid budget or an unknown policy.
    """

    def __init__(self, budget: int | str, policy: Policy = "reservoir", *, at: str = "") -> None:
        self.budget = Budget.of(budget, f"{at}.budget" if at else "budget")
        self.policy = policy
        check_policy(policy)
        self.seen = 0
        self._rows: Rows | None = None
        self._held = 0
        self._capacity: int | None = None  # in samples, known with the first
        self._transforms: dict[str, dict[str, Any]] = {}  # by task id, of samples held raw
        self._tally = ClassTally()

    def __len__(self) -> int:
        return self._held

    @property
    def enabled(self) -> bool:
        """Whether the budget is not 0."""
        return self.budget.amount > 0

    @property
    def held(self) -> Rows:
        """The samples as held: views of length M, by name; none while the buffer is empty."""
        return {} if self._rows is None else {name: tensor[: self._held] for name, tensor in self._rows.items()}

    def offer(self, ctx: Context, batch: Batch, logits: Tensor | None = None) -> None:
        """Offer the current step's incoming samples to the policy; ``logits`` (B, C) are the model's on ``batch``."""
        if self.policy == "herding" or not self.enabled:
            return
        positions, data, task = ctx.rows, ctx.data, ctx.task
        fresh = len(batch.y) if batch.fresh is None else batch.fresh
        fresh = fresh if positions is None else min(fresh, len(positions))

        def pick(part: slice | Tensor) -> Rows:
            kept = None if logits is None else logits[part]
            if positions is None:
                return self._arriving(batch.x[part], batch.y[part], task.id, kept, None, None)
            rows = positions[part]  # the original samples, however this step has changed them
            raw, transform = (None, None) if data.raw is None else (data.raw[rows], task.transform)
            return self._arriving(data.x[rows], data.y[rows], task.id, kept, raw, transform)

        self._admit(batch.y[:fresh], ctx.rng("reservoir"), pick)

    def offer_task(self, ctx: Context) -> None:
        """Offer all samples of a finished task to the policy."""
        if self.policy != "herding" and self.enabled:
            rows = self.rows_of(ctx)
            self._admit(rows["y"], ctx.rng("reservoir"), lambda part: {name: rows[name][part] for name in rows})

    def finalize(self, ctx: Context, *, logits: bool = False) -> None:
        """Choose among a finished task's samples, if the policy is herding; with ``logits`` keep theirs too."""
        if self.policy != "herding" or not self.enabled:
            return
        ctx.model.eval()
        with torch.no_grad():
            outs = [ctx.model(x) for x in torch.split(ctx.data.x, _BATCH)]
        features = torch.cat([out.features for out in outs])
        rows = self.rows_of(ctx, torch.cat([out.logits for out in outs]) if logits else None)
        self.seen += len(ctx.data)
        held = self.held or {name: tensor[:0] for name, tensor in rows.items()}
        self.keep(exemplars((held["task"], held["y"]), rows["y"], features, self.capacity(rows)), rows)

    def add(
        self,
        x: Tensor,
        y: Tensor,
        task: int,
        generator: torch.Generator,
        logits: Tensor | None = None,
        raw: Tensor | None = None,
        transform: dict[str, Any] | None = None,
    ) -> None:
        """Offer samples x (B, ...), y (B,) of ``task`` to the policy; ``generator`` is on the CPU.

        ``logits`` (B, C) and ``raw`` (B, ...) are given with every sample or with none; ``transform`` is that of the
        task.

        Raises
        ------
        ValueError
            If the policy is ``herding``, which chooses among whole tasks, or no sample fits into a budget in bytes.
        """
        if self.policy == "herding":
            raise ValueError("policy=herding: chooses only at a task's end, among all its samples")
        if self.enabled:
            rows = self._arriving(x, y, task, logits, raw, transform)
            self._admit(y, generator, lambda part: {name: rows[name][part] for name in rows})

    def _admit(self, y: Tensor, generator: torch.Generator, pick: Callable[[slice | Tensor], Rows]) -> None:
        """Offer samples to the policy; ``pick`` is called for those that it keeps."""
        if not (count := len(y)):
            return
        if self._capacity is None:
            self._capacity = self.capacity(pick(slice(0, 1)))
        room = min(count, self._capacity - self._held)
        if room:
            self._append(pick(slice(0, room)))
        if self.policy == "class_balanced":
            self._tally.count(y[:room].tolist())
        if count > room:
            slots = self._slots(y[room:], generator, room)
            # if several samples drew one slot the last stays, as when they come one at a time
            taken = {slot: room + i for i, slot in enumerate(slots) if 0 <= slot < self._held}
            if taken:
                assert self._rows is not None
                target = torch.tensor(list(taken), device=y.device)
                for name, tensor in pick(torch.tensor(list(taken.values()), device=y.device)).items():
                    self._rows[name][target] = tensor
        self.seen += count

    def sample(self, count: int, generator: torch.Generator, restore: Restore | None = None) -> Replayed:
        """Return ``count`` different samples, or all if there are fewer.

        Raises
        ------
        ValueError
            If the buffer is empty, or samples are held raw and ``restore`` is not given.
        """
        if self._rows is None:
            raise ValueError("the buffer is empty")
        inputs, rows = self._inputs(restore), self._rows
        chosen = torch.randperm(self._held, generator=generator)[:count].to(inputs.device)
        logits = rows["logits"].index_select(0, chosen) if "logits" in rows else None
        y, task = rows["y"].index_select(0, chosen), rows["task"].index_select(0, chosen)
        return Replayed(inputs.index_select(0, chosen), y, task, logits)

    def draw(self, ctx: Context, count: int | None) -> Replayed:
        """Return ``count`` different samples (None: as many as a batch has) for a training step, augmented."""
        past = self.sample(count or ctx.batch_size, ctx.rng("replay"), ctx.data.restore)
        return past._replace(x=ctx.augment(past.x))

    def rewrite_logits(self, task: int, response: Callable[[Tensor], Tensor], restore: Restore | None = None) -> None:
        """Replace the logits of the held samples of ``task`` with ``response(x)`` (B, C)."""
        held = self.held
        if "logits" in held and (held["task"] == task).any():
            chosen = torch.nonzero(held["task"] == task).squeeze(1)
            held["logits"][chosen] = response(self._inputs(restore)[chosen])

    def keep(self, chosen: Tensor, arriving: Rows | None = None) -> None:
        """Keep only the samples at the positions ``chosen`` (K,) in the held ones followed by ``arriving``."""
        both = held = self.held
        if arriving is not None:
            both = {name: torch.cat([held[name], rows]) if held else rows for name, rows in arriving.items()}
        self._held = len(chosen)
        self._rows = {name: tensor[chosen] for name, tensor in both.items()} if self._held else None

    def drop(self, mask: Tensor) -> int:
        """Erase the samples where ``mask`` (M,) is true and return their number.

        Their memory is freed, and later samples may fill their slots. The count of the stream shrinks in proportion, as
        if it had never held them.
        """
        erased = int(mask.sum())
        if erased:
            left = self._held - erased
            labels = set(self.held["y"].tolist())
            self.seen = max(left, round(self.seen * left / self._held))
            self.keep(torch.nonzero(~mask).squeeze(1))
            self._tally.forget(labels - set(self.held.get("y", mask[:0]).tolist()))
        return erased

    def drop_where(self, name: Literal["y", "task"], values: Sequence[int]) -> int:
        """Erase every sample with one of these targets, or of one of these tasks; return their number."""
        if self._rows is None:
            return 0
        return self.drop(torch.isin(self.held[name], torch.tensor(list(values), device=self._rows["y"].device)))

    def drop_samples(self, x: Tensor) -> int:
        """Erase every sample that equals a row of ``x`` (K, ...), which has the form of the held samples.

        Raises ``ValueError`` if it has another form.
        """
        return 0 if self._rows is None or not len(x) else self.drop(among(self.held["x"], x))

    def state(self) -> State:
        """Return the samples as held, the count of the stream, and the policy's own counts."""
        if self._rows is None:
            return {}
        state: State = {name: tensor for name, tensor in self.held.items() if name != "shown"}
        state |= {"transforms": self._transforms} if self._transforms else {}
        return {**state, "seen": self.seen, **self._tally.state()}

    def load(self, state: State) -> None:
        """Restore what :meth:`state` returned; the buffer will write to the tensors."""
        self.seen = state.get("seen", 0)
        self._rows = {name: state[name] for name in ("x", "y", "task", "logits") if name in state} or None
        self._held = 0 if self._rows is None else len(self._rows["y"])
        self._capacity = None if self._rows is None else self.capacity(self._rows)
        self._transforms = dict(state.get("transforms", {}))
        self._tally = ClassTally.of(state)

    def rows_of(self, ctx: Context, logits: Tensor | None = None) -> Rows:
        """Return all samples of the current task in the buffer's form, for :meth:`keep`."""
        return self._arriving(ctx.data.x, ctx.data.y, ctx.task.id, logits, ctx.data.raw, ctx.task.transform)

    def _arriving(
        self,
        x: Tensor,
        y: Tensor,
        task: int,
        logits: Tensor | None,
        raw: Tensor | None,
        transform: dict[str, Any] | None,
    ) -> Rows:
        rows = {"x": x if raw is None else raw, "y": y, "task": torch.full_like(y, task)}
        if logits is not None:
            rows["logits"] = logits
        if raw is not None:
            self._transforms |= {} if transform is None else {str(task): transform}
            if self._rows is None or "shown" in self._rows:
                rows["shown"] = x
        return rows

    def capacity(self, rows: Rows) -> int:
        """Return how many samples like ``rows`` the budget has room for."""
        return self.budget.samples(sum(t[:1].nbytes for name, t in rows.items() if name != "shown"))

    def _inputs(self, restore: Restore | None) -> Tensor:
        """Return the inputs in the form that the model reads, (M or more, ...)."""
        assert self._rows is not None
        raw = self._rows["x"]
        if raw.dtype != torch.uint8:
            return raw
        if "shown" not in self._rows:
            if restore is None:
                raise ValueError("samples are held raw: `restore` must be given")
            held = self.held
            self._rows["shown"] = shown(held["x"], held["task"], self._transforms, restore)
        return self._rows["shown"]

    def _slots(self, late_y: Tensor, generator: torch.Generator, room: int) -> list[int]:
        if self.policy == "reservoir":
            return uniform_slots(self.seen + room, len(late_y), generator)
        return self._tally.slots(self.held["y"].tolist(), late_y.tolist(), generator)

    def _append(self, rows: Rows) -> None:
        start, stop = self._held, self._held + len(rows["y"])
        if self._rows is None or len(self._rows["y"]) < stop:
            assert self._capacity is not None
            self._rows = grown(self.held, rows, min(self._capacity, max(stop, 2 * start)))
        for name, tensor in rows.items():
            self._rows[name][start:stop] = tensor
        self._held = stop
