"""Late updates brought up to date by gradient inversion: invert at the old model, train again at the present one.

Wang and Gao, AAAI 2025 (arXiv 2309.13536). The inversion itself is in :mod:`strategies.staleness.inversion`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fedcl.requests import ForgetRequest, Residual
from fedcl.server.contracts import LocalWork, ServerView, Staleness, Update
from strategies.staleness.inversion import Search, Simulation, Variant, batch_plan, invert, largest, trainable
from strategies.staleness.rebase import rebased
from strategies.staleness.weighting import exponential

# P = parameters, N = made-up samples, C = allowed columns
DECAY = 0.9  # of the moving means that the switch compares
REASONS = ("residual", "size", "switch", "uniqueness")


@dataclass
class Memory:
    """What is kept of a late client: its made-up samples, and the late change until a fresh one can be compared."""

    task: int
    x: Tensor  # (N, ...)
    y: Tensor  # (N, C)
    change: Tensor | None  # (P,) float32


class GradientInversion(Staleness):
    """Replace a late change by what the client's training would have changed in the present model.

    Samples are sought whose training at the client's base gives its change (softmax cross-entropy with soft labels: the
    client's own loss); the same training at the present model is the new change. A late update is only weighted by
    2^(-age / ``half_life``) instead when the samples explain its change too badly, when the visit is too long to play
    through, when it is not unlike the fresh ones, or when hindsight says that inversion errs more than staleness does.

    Hindsight: when a client's next update comes, what its samples predict at *that* update's base, and its late
    change, are both compared with what the client really did. Moving means of the two relative L1 errors decide for
    the rest of the task.

    Parameters
    ----------
    samples
        Made-up samples a client, at most; never more than it has of its own.
    iterations, lr, patience
        Of the search: Adam's steps, its learning rate, and the steps without progress after which it stops.
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
    variant
        ``official`` searches as the published code does: sign of the inputs' gradient, binary cross-entropy on
        log-probabilities, normal target logits, a box around the inputs. Its learning rate is 1.

    Raises
    ------
    ValueError
        If a parameter is out of its range.
    """

    def __init__(
        self,
        *,
        samples: int = 32,
        iterations: int = 400,
        lr: float = 0.1,
        patience: int = 100,
        top: float = 1.0,
        max_residual: float = 0.3,
        max_steps: int = 64,
        warm_start: bool = True,
        switch_after: int | None = 3,
        uniqueness: float = 0.0,
        half_life: float | None = 20.0,
        variant: Variant = "consistent",
    ) -> None:
        counts = {"samples": samples, "iterations": iterations, "patience": patience, "max_steps": max_steps}
        sizes = {"lr": lr, "max_residual": max_residual, "half_life": 1.0 if half_life is None else half_life}
        for name, value in (counts | sizes).items():
            if value <= 0:
                raise ValueError(f"strategy.staleness.server.{name}={value}: must be > 0")
        if not 0 < top <= 1:
            raise ValueError(f"strategy.staleness.server.top={top}: must be in (0, 1]")
        self.samples, self.max_residual, self.max_steps = samples, max_residual, max_steps
        self.top, self.warm_start, self.switch_after = top, warm_start, switch_after
        self.uniqueness, self.half_life, self.variant = uniqueness, half_life, variant
        self.search = Search(iterations, lr, patience, variant)
        self._work: LocalWork | None = None
        self._clients: dict[str, Memory] = {}
        self._errors: dict[str, float] = {}
        self._counts: dict[str, float] = {}

    def bind(self, work: LocalWork) -> None:
        """Take a model of one's own to simulate with; dropout is off in it."""
        self._work = LocalWork(work.model.twin(), work.training, work.stream, work.input_shape)
        self._work.model.eval()

    # -- late updates -----------------------------------------------------------------------------------------------

    def admit(self, updates: list[Update], view: ServerView) -> list[Update]:
        """Bring late updates up to date."""
        fresh = [update.delta for update in updates if update.age == 0]
        return [self._corrected(update, fresh, view) if update.age else update for update in updates]

    def _corrected(self, update: Update, fresh: list[Tensor], view: ServerView) -> Update:
        why = self._unfit(update, fresh)
        change = None if why else self._inverted(update, view)
        if change is not None:
            self._count("inverted")
            return rebased(update, change, view)
        self._count("fallbacks")
        self._count(f"fallbacks_{why or 'residual'}")
        if self.half_life is None:
            return update
        return rebased(update, update.delta * exponential(update.age, self.half_life), view)

    def _unfit(self, update: Update, fresh: list[Tensor]) -> str | None:
        """Return why an update is not worth or not open to inversion."""
        work = self._bound()
        epoch = -(-update.num_examples // work.training.batch_size)
        if epoch * work.training.epochs > self.max_steps or epoch > min(self.samples, update.num_examples):
            return "size"
        if self._switched(update.task):
            return "switch"
        nearest = min((1 - float(_cosine(update.delta, other)) for other in fresh), default=2.0)
        return "uniqueness" if nearest < self.uniqueness else None

    def _inverted(self, update: Update, view: ServerView) -> Tensor | None:
        """Return the change (P,) float64 that the client would make now, or None if it cannot be told."""
        work = self._bound()
        device, trained = work.model.device, trainable(work.model)
        late = (update.delta.to(device) * trained).float()
        norm = float(torch.linalg.vector_norm(late))
        if norm == 0:
            return None
        simulation, base = self._simulation(update, view), update.base.to(device)
        matched = largest(late, trained, self.top)
        x, y = invert(simulation, base, late, self._start(update, view), matched, self.search)
        residual = float(torch.linalg.vector_norm(simulation.change(base, x, y) - late)) / norm
        self._counts["residual"] = residual
        if not residual <= self.max_residual:
            self._clients.pop(update.client, None)  # samples that explain nothing are no start for the next search
            return None
        self._clients[update.client] = Memory(update.task, x.cpu(), y.cpu(), late.cpu())
        now = simulation.change(view.model_of(update.client).to(device), x, y)
        # what no gradient moves, such as running statistics, is taken as it came
        return torch.where(trained, now.double(), update.delta.to(device)).cpu()

    def _simulation(self, update: Update, view: ServerView) -> Simulation:
        work = self._bound()
        mask = work.stream.train_task(update.task).mask
        columns = None if mask is None else torch.tensor(mask, device=work.model.device)
        generator = view.rng(f"inversion batches {update.client}")
        rows = min(self.samples, update.num_examples)
        plan = batch_plan(rows, update.num_examples, work.training, generator, work.model.device)
        return Simulation(work.model, work.training, columns, plan, self.variant)

    def _start(self, update: Update, view: ServerView) -> tuple[Tensor, Tensor]:
        """Return the samples to begin from: last time's, or normal ones."""
        work = self._bound()
        device, known = work.model.device, self._clients.get(update.client)
        rows = min(self.samples, update.num_examples)
        if self.warm_start and known is not None and known.task == update.task and len(known.x) == rows:
            return known.x.to(device), known.y.to(device)
        generator = view.rng(f"inversion {update.client}")
        mask = work.stream.train_task(update.task).mask
        columns = sum(work.stream.heads) if mask is None else len(mask)
        x = torch.randn((rows, *work.input_shape), generator=generator)
        return x.to(device), torch.randn((rows, columns), generator=generator).to(device)

    def _bound(self) -> LocalWork:
        if self._work is None:
            raise RuntimeError("gradient inversion was not told how clients train: call bind first")
        return self._work

    def _count(self, name: str) -> None:
        self._counts[name] = self._counts.get(name, 0.0) + 1.0

    # -- hindsight --------------------------------------------------------------------------------------------------

    def observe(self, update: Update, view: ServerView) -> None:
        """Compare the client's late change, and what its samples predict, with what it did this time."""
        known = self._clients.get(update.client)
        if self.switch_after is None or known is None or known.change is None:
            return
        late, known.change = known.change, None
        if known.task != update.task or len(known.x) != min(self.samples, update.num_examples):
            return
        device = self._bound().model.device
        simulation = self._simulation(update, view)
        told = simulation.change(update.base.to(device), known.x.to(device), known.y.to(device)).cpu()
        true = update.delta * trainable(self._bound().model).cpu()
        size = float(true.abs().sum())
        if size == 0:
            return
        if self._errors.get("task") != update.task:
            self._errors = {"task": update.task, "compared": 0}
        first = self._errors["compared"] == 0
        for name, guess in (("inverted", told), ("late", late)):
            error = float((guess.double() - true).abs().sum()) / size
            self._errors[name] = error if first else DECAY * self._errors[name] + (1 - DECAY) * error
        self._errors["compared"] += 1

    def _switched(self, task: int) -> bool:
        errors = self._errors
        if self.switch_after is None or errors.get("task") != task or errors["compared"] < self.switch_after:
            return False
        return errors["inverted"] > errors["late"]

    # -- survival ---------------------------------------------------------------------------------------------------

    def metrics(self) -> dict[str, float]:
        """Return how many late updates were inverted and how many fell back, and the errors seen in hindsight."""
        errors = {f"hindsight_{name}": self._errors[name] for name in ("inverted", "late") if name in self._errors}
        return dict(self._counts) | errors

    def state_dict(self) -> dict[str, Any]:
        """Return late clients' made-up samples and changes, counts, and errors in hindsight."""
        clients = {client: {k: v for k, v in vars(m).items() if v is not None} for client, m in self._clients.items()}
        parts = {"clients": clients, "counts": dict(self._counts), "errors": dict(self._errors)}
        return {name: part for name, part in parts.items() if part}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore it."""
        self._clients = {client: Memory(**{"change": None, **m}) for client, m in state.get("clients", {}).items()}
        self._counts, self._errors = dict(state.get("counts", {})), dict(state.get("errors", {}))

    def forget(self, request: ForgetRequest) -> Residual:
        """Drop the samples made up for the clients named, or for all if it names none."""
        for client in request.clients or tuple(self._clients):
            self._clients.pop(client, None)
        self._errors = {}
        return Residual(type(self).__name__, "erased", "samples made up for late clients are dropped")


def _cosine(a: Tensor, b: Tensor) -> Tensor:
    return torch.nn.functional.cosine_similarity(a, b, dim=0)
