"""FOT: every change of the model stays orthogonal to the layer inputs of earlier tasks.

Bakman, Yaldiz, Ezzeldin, Avestimehr, "Federated Orthogonal Training: Mitigating Global Catastrophic Forgetting in
Continual Federated Learning", ICLR 2024: FedProject (:meth:`FOT.apply`) and global principal subspace extraction
(:meth:`FOT.queries`, :meth:`FOT.consume`). ``docs/methods/fot.md`` explains the two variants.
"""

# P = parameters, D = inputs of a layer, K = rank of its basis, Q = columns of a sketch, N = new directions
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from fedcl.base.linalg import project_out
from fedcl.contracts.strategy import Event, LocalWork, Target
from fedcl.contracts.view import Query, Response, ServerView
from fedcl.models.flat import Spec, TensorSpec
from strategies.projection.growth import GrowingBases
from strategies.projection.subspace import KEY, frozen, inputs, protected, readable, unprotected

Policy = Literal["average", "freeze"]


@dataclass(kw_only=True, eq=False, repr=False)
class FOT(GrowingBases):
    """Project every change onto the complement of each layer's basis; extend the bases at the end of a task.

    Parameters
    ----------
    epsilon
        Share of the energy of a layer's inputs that its basis must keep, in (0, 1].
    epsilon_increment
        Added to epsilon after each extension; epsilon stays at most 1.
    variant
        ``official``: what the published code does. ``corrected``: what its energy argument asks for.
    method
        What clients send: ``gram`` (D, D), exact; ``range_finder`` (D, sketch_width), the Gram matrix times random
        signs that all share; ``sketch`` (D, sketch_width), the residual times numbers of the client's own. ``auto`` is
        the Gram matrix, and the sketch for ``official``, which knows no other.
    sketch_width
        Columns of a sketch; None for as many as the layer has inputs, a quarter of them for the range finder.
    layers
        Names of the weights to protect; None for every weight matrix and 2-d kernel that no task head owns.
    project_heads
        Whether a head that all tasks share is among them.
    biases, norms
        What becomes of biases, and of the parameters and statistics of normalisation layers, after the first
        extension: ``average`` as before, or ``freeze``, no change any more.
    asks
        Which clients are queried in the corrected variant: ``all``; those whose task has ``ended``; or those of the
        last round (``updated``), as always in ``official``.
    extend_at
        ``task``: whenever a task ends. A number n: every n rounds, for streams whose tasks have no ends.
    unlearn_basis
        What an unlearning request does to the bases. ``keep``: nothing. ``drop_task``: directions from responses of the
        clients concerned are taken out. ``keep_grams``: every client's Gram matrices are kept, and bases are rebuilt
        without those of the clients concerned. ``recompute``: clients are queried for all of it again.

    Raises
    ------
    ValueError
        From :meth:`setup`: a layer does not exist or cannot be protected, or two settings exclude each other.
    """

    layers: Sequence[str] | None = None
    project_heads: bool = True
    biases: Policy = "average"
    norms: Policy = "average"
    asks: Literal["all", "ended", "updated"] = "all"
    extend_at: Literal["task"] | int = "task"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._frozen: list[TensorSpec] = []
        self._unreadable: set[str] = set()
        self._asked_in = 0

    @property
    def keeps_updates(self) -> bool:  # type: ignore[override]
        """Whether the round's updates decide whom to ask."""
        return self.variant == "official" or self.asks == "updated"

    def setup(self, spec: Spec) -> None:
        if self.variant == "official" and self.method in ("gram", "range_finder"):
            raise ValueError(f"{KEY}.method={self.method}: variant=official sends sketches; use auto")
        if self.unlearn_basis == "keep_grams" and (self.sketches or self.method == "range_finder"):
            raise ValueError(f"{KEY}.unlearn_basis=keep_grams: needs variant=corrected and method=gram or auto")
        every = self.extend_at
        if every != "task" and self.asks == "ended":
            raise ValueError(f"{KEY}.asks=ended: with extend_at={every} no task ends; use all or updated")
        weights = {t.name.removesuffix(".weight"): t for t in protected(spec, self.layers, self.project_heads)}
        self._weights = {layer: weight for layer, weight in weights.items() if layer not in self._unreadable}
        freezes = {"biases": self.biases == "freeze", "norms": self.norms == "freeze"}
        self._frozen = frozen(spec, **freezes, project_heads=self.project_heads)

    def bind(self, work: LocalWork) -> None:
        """Leave out what is no layer whose inputs can be read, and note what so stays unprotected.

        A stream in which no task ends before the run does is noted too: with ``extend_at=task`` no basis would grow.
        """
        self._unreadable |= {layer for layer in self._weights if not readable(work.model.module, layer)}
        if self._unreadable and (self.layers is not None or self._unreadable >= self._weights.keys()):
            wrong = f"{KEY}.layers={self.layers}: {min(self._unreadable)} is no linear layer or ungrouped convolution"
            raise ValueError(f"{wrong}; name others, or choose another model")
        self.setup(work.model.spec)
        if not self._weights and not work.model.fixed:  # below a fixed body and tasks' own heads nothing is shared
            raise ValueError(f"{KEY}.layers={self.layers}: leaves no weight to protect")
        left = unprotected(work.model.spec, self._weights.values(), self.project_heads)
        if left and self.layers is None:
            self._notes.append({"kind": "weights_unprotected", "weights": left})
        if self.extend_at == "task" and work.stream.num_tasks == 1:
            self._notes.append({"kind": "subspace_never_extended", "change": f"{KEY}.extend_at=ROUNDS"})

    def apply(self, target: Target, change: Tensor, view: ServerView) -> Tensor:
        """Return the change (P,) without what each layer's basis spans: dW - (dW U) U^T (FedProject, eq. 5)."""
        allowed = change.clone()
        for layer, basis_DK in self._bases.items():
            weight = self._weights[layer]
            rows = allowed[weight.start : weight.stop].view(-1, basis_DK.shape[0])
            rows.copy_(project_out(rows, basis_DK))
        for tensor in self._frozen if self._extensions else ():
            allowed[tensor.start : tensor.stop] = 0.0
        return allowed

    def queries(self, event: Event, view: ServerView) -> list[Query]:
        """Ask for the layer inputs' subspace whenever it is to be extended: not any more when the run ends."""
        every, task_end = self.extend_at, event.kind == "task_end"
        due = task_end if every == "task" else (event.server_round + 1) % every == 0
        if not due or event.is_last_task or not self._weights:
            return []
        if self.variant == "official":
            models = {update.client: update.model for update in event.updates}
        else:
            updated = tuple(update.client for update in event.updates)
            asked = {"all": view.clients, "ended": event.clients, "updated": updated}[self.asks]
            models = {client: view.model_of(client) for client in asked}
        self._asked_in = event.server_round
        return [self._query(models, view)] if models else []

    def consume(self, query: Query, responses: Sequence[Response], view: ServerView) -> None:
        """Extend each layer's basis by the principal directions of what it does not hold yet (GPSE)."""
        if responses:
            added = self._extend(responses, query, view.device)
            self._remember(self._asked_in, responses, added)

    def notes(self) -> list[dict[str, Any]]:
        """Return since the last call: layers that are more than 90 % frozen now, sketches too narrow for epsilon."""
        notes, self._notes = self._notes, []
        return notes

    def metrics(self) -> dict[str, float]:
        """Return ``rank/<layer>``, ``frozen_share/<layer>`` (rank over inputs), epsilon, and how often it all grew."""
        numbers = {"epsilon": self.epsilon, "answers_ignored": 0.0}
        numbers["extensions"] = float(self._extensions)
        if self.unlearn_basis == "keep_grams":
            numbers["gram_bytes"] = float(self._memory.num_bytes())
        for layer, weight in self._weights.items():
            rank = self.basis(layer).shape[1]
            numbers |= {f"rank/{layer}": float(rank), f"frozen_share/{layer}": rank / inputs(weight)}
        return numbers
