"""Late updates brought up to date by gradient inversion: invert at the old model, train again at the present one.

Wang and Gao, AAAI 2025 (arXiv 2309.13536). The client's local round is simulated by
:mod:`strategies.staleness.inversion`, samples are searched for by :mod:`strategies.staleness.search`.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from fedcl.contracts.requests import ErasureOutcome, ForgetRequest
from fedcl.contracts.strategy import LocalWork, Staleness, Update
from fedcl.contracts.view import ServerView
from strategies.staleness.hindsight import Hindsight
from strategies.staleness.inversion import Variant
from strategies.staleness.rebase import rebased
from strategies.staleness.search import Answer, Riddle, Search, solve
from strategies.staleness.visits import Visits
from strategies.staleness.weighting import exponential

# P = parameters, N = made-up samples, C = allowed columns


@dataclass
class Memory:
    """What is kept of a late client: its made-up samples, and the late change until a fresh one can be compared."""

    task: int
    x: Tensor  # (N, ...)
    y: Tensor  # (N, C)
    change: Tensor | None  # (P,) float32
    age: int = 0  # versions that it was late


class GradientInversion(Staleness):
    """Replace a late change by what the client's training would have changed in the present model.

    Samples are sought whose training at the client's base gives its change (softmax cross-entropy with soft labels: the
    client's own loss); the same training at the present model is the new change. A late update is only weighted by
    2^(-age / ``half_life``) instead if the samples do not explain its change (the client may minimise more than that
    loss), if the local round is too long to simulate, if the change is not unlike the fresh ones, or if inversion has
    erred more than staleness so far.

    Hindsight: when a client's next update comes, what its samples predict at *that* update's base, and its late
    change, are both compared with what the client really did. Moving means of the two relative L1 errors decide for
    the rest of the task.

    Parameters
    ----------
    samples
        Made-up samples a client, at most; never more than it has of its own.
    iterations, lr, patience, tolerance
        Of the search: Adam's steps, its learning rate, the steps without progress after which it stops, and the
        relative L1 distance at which it does.
    spread, label_spread
        Standard deviations of the inputs and of the target logits that the search begins with.
    top
        Share of the entries of a change that are matched, the largest ones, in (0, 1].
    max_residual
        ||found - change|| / ||change|| beyond which samples are not used.
    max_steps
        Longest visit, in steps, that is played through: memory grows with steps times samples.
    warm_start
        Begin from the client's samples of last time, within a task.
    switch_after
        Comparisons in hindsight after which inversion may be switched off; null: never.
    uniqueness
        Cosine distance from every fresh change of the round that a late one must have to be inverted; 0: none.
    half_life
        Of the weighting in versions; null: the change as it came.
    together
        Late clients that are inverted as one batch, if their local rounds have the same shape.
    variant
        ``official`` is the published code's: sign of the inputs' gradient, binary cross-entropy on log-probabilities,
        standard normal inputs and target logits, a box around the inputs, the last samples instead of the best, no warm
        start, and whatever is found is used. Made for lr 1, 256 samples and 40,000 iterations.
    """

    def __init__(
        self,
        *,
        samples: int = 16,
        iterations: int = 120,
        lr: float = 0.2,
        patience: int = 40,
        tolerance: float = 0.03,
        spread: float = 0.3,
        label_spread: float = 0.1,
        top: float = 1.0,
        max_residual: float = 0.3,
        max_steps: int = 64,
        warm_start: bool = True,
        switch_after: int | None = 3,
        uniqueness: float = 0.0,
        half_life: float | None = 20.0,
        together: int = 4,
        variant: Variant = "consistent",
    ) -> None:
        official = variant == "official"
        self.samples, self.max_steps, self.together = samples, max_steps, together
        self.spread = (1.0, 1.0) if official else (spread, label_spread)
        self.max_residual = float("inf") if official else max_residual
        self.warm_start, self.uniqueness = warm_start and not official, 0.0 if official else uniqueness
        self.half_life, self.variant = half_life, variant
        self.search = Search(iterations, lr, patience, tolerance, 1.0 if official else top, variant)
        self.hindsight = Hindsight(None if official else switch_after)
        self._visits: Visits | None = None
        self._clients: dict[str, Memory] = {}
        self._counts: dict[str, float] = {}
        self._seconds = 0.0
        self._notes: list[dict[str, Any]] = []

    def bind(self, work: LocalWork) -> None:
        self._visits = Visits(work, self.samples, self.variant)
        if not work.plain_loss:
            self._notes.append({"kind": "inversion_of_plain_loss", "why": "clients descend on more than cross-entropy"})

    # -- late updates -----------------------------------------------------------------------------------------------

    def admit(self, updates: list[Update], view: ServerView) -> list[Update]:
        late = [update for update in updates if update.age]
        if not late:
            return updates
        fresh = [update.delta for update in updates if update.age == 0]
        why = {update.client: self._unfit(update, fresh) for update in late}
        solutions = self._solved([update for update in late if why[update.client] is None], view)
        return [
            self._corrected(update, solutions.get(update.client), why[update.client], view) if update.age else update
            for update in updates
        ]

    def _unfit(self, update: Update, fresh: Sequence[Tensor]) -> str | None:
        """Return why an update is not worth or not open to inversion."""
        visits = self._bound()
        if visits.steps(update) > self.max_steps or visits.epoch(update) > visits.rows(update):
            return "size"
        if self.hindsight.prefers_late(update.task):
            return "switch"
        if not bool((update.delta[visits.trained.cpu()] != 0).any()):
            return "nothing"
        nearest = min((1 - float(cosine_similarity(update.delta, other, dim=0)) for other in fresh), default=2.0)
        return "uniqueness" if nearest < self.uniqueness else None

    def _solved(self, updates: Sequence[Update], view: ServerView) -> dict[str, Answer]:
        """Return the solutions by client: all searches start before the first is waited for."""
        asked = []
        shaped = sorted(updates, key=self._bound().shape)  # stable: canonical order within a shape
        for _, group in groupby(shaped, key=self._bound().shape):
            alike = list(group)
            for start in range(0, len(alike), self.together):
                batch = alike[start : start + self.together]
                riddles = [self._riddle(update, view) for update in batch]
                asked.append((batch, self._submit(batch[0].task, riddles, view)))
        solutions: dict[str, Answer] = {}
        for batch, future in asked:
            found, seconds = future.result()
            self._seconds += seconds
            solutions |= {update.client: answer for update, answer in zip(batch, found, strict=True)}
        if solutions:
            self._counts["residual"] = sum(answer.residual for answer in solutions.values()) / len(solutions)
        return solutions

    def _submit(self, task: int, riddles: list[Riddle], view: ServerView) -> Future[tuple[list[Answer], float]]:
        visits = self._bound()
        simulation = visits.simulation(task)
        if visits.device.type == "cpu":
            return view.compute(solve, simulation, self.search, riddles)
        here: Future[tuple[list[Answer], float]] = Future()  # workers may have no accelerator
        here.set_result(solve(simulation, self.search, riddles))
        return here

    def _corrected(self, update: Update, answer: Answer | None, why: str | None, view: ServerView) -> Update:
        if answer is not None:
            self._count("searches")
            self._count("iterations", answer.iterations)
            if answer.residual <= self.max_residual:
                return self._accepted(update, answer, view)
            # samples that explain nothing are no start for the next search
            self._clients.pop(update.client, None)
        reason = why or "residual"
        self._count("fallbacks")
        self._count(f"fallbacks_{reason}")
        note: dict[str, Any] = {"client": update.client, "age": update.age, "reason": reason}
        self._notes.append({"kind": "inversion_refused"} | note | ({"residual": answer.residual} if answer else {}))
        if self.half_life is None:
            return update
        return rebased(update, update.delta * exponential(update.age, self.half_life), view)

    def _accepted(self, update: Update, answer: Answer, view: ServerView) -> Update:
        self._count("inverted")
        trained, late = self._bound().trained.cpu(), update.delta
        memory = Memory(update.task, answer.x.cpu(), answer.y.cpu(), (late * trained).float(), update.age)
        self._clients[update.client] = memory
        # what no gradient moves, such as running statistics, is taken as it came
        return rebased(update, torch.where(trained, answer.change.cpu().double(), late), view)

    def _riddle(self, update: Update, view: ServerView) -> Riddle:
        visits = self._bound()
        late = (update.delta.to(visits.device) * visits.trained).float()
        base, now = update.base.to(visits.device), view.model_of(update.client).to(visits.device)
        known = self._clients.get(update.client) if self.warm_start else None
        if known is not None and known.task == update.task and len(known.x) == visits.rows(update):
            x, y = known.x.to(visits.device), known.y.to(visits.device)
        else:
            x, y = visits.start(update, view, self.spread)
        return Riddle(base, late, now, x, y, visits.plan(update, view))

    def _bound(self) -> Visits:
        if self._visits is None:
            raise RuntimeError("gradient inversion does not know how clients train: call bind first")
        return self._visits

    def _count(self, name: str, more: float = 1.0) -> None:
        self._counts[name] = self._counts.get(name, 0.0) + more

    # -- afterwards -------------------------------------------------------------------------------------------------

    def observe(self, update: Update, view: ServerView) -> None:
        """Compare the client's late change, and what its samples predict, with what it did this time."""
        known = self._clients.get(update.client)
        if self.hindsight.after is None or known is None or known.change is None:
            return
        late, known.change = known.change, None
        visits = self._bound()
        if known.task != update.task or len(known.x) != visits.rows(update):
            return
        base, x, y = (tensor.to(visits.device)[None] for tensor in (update.base, known.x, known.y))
        plan = [rows[None] for rows in visits.plan(update, view)]
        predicted = visits.simulation(update.task).changes(base, x, y, plan)[0].cpu()
        errors = self.hindsight.compare(update.task, predicted, late, update.delta * visits.trained.cpu())
        if errors:
            self._notes.append({"kind": "hindsight", "client": update.client, "age": known.age, **errors})

    # -- survival ---------------------------------------------------------------------------------------------------

    def metrics(self) -> dict[str, float]:
        """Return how many late updates were inverted and how many fell back, and the errors seen in hindsight."""
        return dict(self._counts) | self.hindsight.metrics()

    def timings(self) -> dict[str, float]:
        """Return the seconds that searches took since the last call, wherever they ran."""
        seconds, self._seconds = self._seconds, 0.0
        return {"inversion": seconds} if seconds else {}

    def notes(self) -> list[dict[str, Any]]:
        """Return why late updates were not inverted, each once."""
        notes, self._notes = self._notes, []
        return notes

    def state_dict(self) -> dict[str, Any]:
        """Return late clients' made-up samples and changes, counts, and errors in hindsight."""
        clients = {client: {k: v for k, v in vars(m).items() if v is not None} for client, m in self._clients.items()}
        parts = {"clients": clients, "counts": dict(self._counts), "errors": self.hindsight.state_dict()}
        return {name: part for name, part in parts.items() if part}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._clients = {client: Memory(**{"change": None, **m}) for client, m in state.get("clients", {}).items()}
        self._counts = dict(state.get("counts", {}))
        self.hindsight.load_state_dict(state.get("errors", {}))

    def forget(self, request: ForgetRequest) -> ErasureOutcome:
        """Drop the samples made up for the clients named, or for all if it names none."""
        for client in request.clients or tuple(self._clients):
            self._clients.pop(client, None)
        self.hindsight.load_state_dict({})
        name, why = type(self).__name__, "samples made up for late clients are dropped, and errors seen in hindsight"
        if self._clients:
            return ErasureOutcome(
                name, "retained", f"{why}; those of other clients stay, made with models that had seen it"
            )
        return ErasureOutcome(name, "reset", why)
