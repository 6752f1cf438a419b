"""FOT: every change of the model stays orthogonal to the layer inputs of earlier tasks.

Bakman, Yaldiz, Ezzeldin, Avestimehr, "Federated Orthogonal Training: Mitigating Global Catastrophic Forgetting in
Continual Federated Learning", ICLR 2024: FedProject (:meth:`FOT.apply`) and global principal subspace extraction
(:meth:`FOT.queries`, :meth:`FOT.absorb`). ``docs/methods/fot.md`` tells the two variants apart.
"""

# P = parameters, D = inputs of a layer, K = rank of its basis, Q = columns of a sketch, N = new directions
from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from fedcl.linalg import extend_basis, project_out
from fedcl.models.flat import Spec, TensorSpec
from fedcl.requests import ForgetRequest, Residual
from fedcl.server.contracts import Answer, Event, LocalWork, Projection, Query, ServerView, Target
from strategies.projection.subspace import (
    KEY,
    Found,
    from_grams,
    from_official,
    from_ranges,
    from_sketches,
    frozen,
    inputs,
    protected,
    readable,
    unprotected,
)

SUBSPACE = "subspace"
NEARLY_FULL = 0.9  # share of a layer's inputs that is frozen: above it a layer hardly learns
Variant = Literal["official", "corrected"]
Method = Literal["auto", "gram", "sketch", "range_finder"]
Fate = Literal["average", "freeze"]


class FOT(Projection):
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
        Which clients answer in the corrected variant: ``all``; those whose task has ``ended``; or those of the last
        round (``updated``), to whom ``official`` always turns.
    extend_at
        ``task``: whenever a task ends. A number n: every n rounds, for streams whose tasks have no ends.

    Raises
    ------
    ValueError
        From :meth:`setup`: a layer does not exist or cannot be protected, or two settings exclude each other.
    """

    def __init__(
        self,
        *,
        epsilon: float = 0.9,
        epsilon_increment: float = 0.0,
        variant: Variant = "corrected",
        method: Method = "auto",
        sketch_width: int | None = None,
        layers: Sequence[str] | None = None,
        project_heads: bool = True,
        biases: Fate = "average",
        norms: Fate = "average",
        asks: Literal["all", "ended", "updated"] = "all",
        extend_at: Literal["task"] | int = "task",
    ) -> None:
        self.epsilon, self.epsilon_increment = epsilon, epsilon_increment
        self.variant, self.method, self.sketch_width = variant, method, sketch_width
        self.layers, self.project_heads, self.biases, self.norms = layers, project_heads, biases, norms
        self.asks, self.extend_at = asks, extend_at
        self._weights: dict[str, TensorSpec] = {}
        self._frozen: list[TensorSpec] = []
        self._bases: dict[str, Tensor] = {}
        self._unreadable: set[str] = set()
        self._extensions = self._ignored = 0
        self._notes: list[dict[str, Any]] = []

    @property
    def keeps_updates(self) -> bool:  # type: ignore[override]
        """Whether the round's updates decide whom to ask."""
        return self.variant == "official" or self.asks == "updated"

    @property
    def sketches(self) -> bool:
        """Whether clients send sketches with random numbers of their own."""
        return self.method == "sketch" or self.variant == "official"

    def basis(self, layer: str) -> Tensor:
        """Return the orthonormal basis (D, K) of ``layer``, float64 on the CPU; K = 0 before the first extension."""
        return self._bases.get(layer, torch.zeros(inputs(self._weights[layer]), 0, dtype=torch.float64))

    def setup(self, spec: Spec) -> None:
        """Find the weights to protect, and what is to be frozen."""
        if self.variant == "official" and self.method in ("gram", "range_finder"):
            raise ValueError(f"{KEY}.method={self.method}: variant=official sends sketches; use auto")
        every = self.extend_at
        if every != "task" and (isinstance(every, bool) or not isinstance(every, int) or every < 1):
            raise ValueError(f"{KEY}.extend_at={every}: must be task or int >= 1")
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
        left = unprotected(work.model.spec, self._weights.values(), self.project_heads)
        if left and self.layers is None:
            self._notes.append({"kind": "weights_unprotected", "weights": left})
        if self.extend_at == "task" and work.stream.num_tasks == 1:
            self._notes.append({"kind": "subspace_never_extended", "change": f"{KEY}.extend_at=ROUNDS"})

    def resize(self, old_spec: Spec, new_spec: Spec) -> None:
        """Find the weights again; a basis belongs to a layer's inputs, so it may gain outputs only."""
        self.setup(new_spec)
        for layer, basis_DK in self._bases.items():
            if layer not in self._weights or inputs(self._weights[layer]) != basis_DK.shape[0]:
                raise ValueError(f"strategy.projection: the inputs of {layer} have changed; FOT has a basis for them")

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
        if not due or event.is_last_task:
            return []
        if self.variant == "official":
            models = {update.client: update.model for update in event.updates}
        else:
            updated = tuple(update.client for update in event.updates)
            asked = {"all": view.clients, "ended": event.clients, "updated": updated}[self.asks]
            models = {client: view.model_of(client) for client in asked}
        return [Query(SUBSPACE, models, self._request(view))] if models else []

    def _request(self, view: ServerView) -> dict[str, Tensor]:
        # With Gram matrices the server projects; the empty bases only say which layers are meant.
        whole = self.sketches or self.method == "range_finder"
        bases = {layer: self.basis(layer).float() for layer in self._weights}
        request = {f"{layer}/basis": u if whole else u[:, :0].contiguous() for layer, u in bases.items()}
        if self.method == "range_finder":
            generator = view.rng("subspace")
            for layer in self._weights:
                seed = int(torch.randint(0, 2**62, (1,), generator=generator))
                request[f"{layer}/draw"] = torch.tensor([seed, self._width(layer)])
        return request

    def _width(self, layer: str) -> int:
        """Return Q for ``layer``."""
        count = inputs(self._weights[layer])
        if self.method != "range_finder":
            return self.sketch_width or count
        return min(count, self.sketch_width or -(-count // 4))

    def absorb(self, query: Query, answers: Sequence[Answer], view: ServerView) -> None:
        """Extend each layer's basis by the principal directions of what it does not hold yet (GPSE)."""
        sound = [answer for answer in answers if self._fits(answer)]
        self._ignored += len(answers) - len(sound)
        if not sound:
            return
        for layer, weight in self._weights.items():
            found = self._estimate(layer, sound, query, view.device)
            if found.short:
                self._notes.append({"kind": "sketch_too_narrow", "layer": layer, "width": self._width(layer)})
            before, extended = self.basis(layer), extend_basis(self.basis(layer), found.directions_DN.cpu())
            if extended.shape[1]:
                self._bases[layer] = extended
            share = extended.shape[1] / inputs(weight)
            if share > NEARLY_FULL >= before.shape[1] / inputs(weight):
                self._notes.append({"kind": "subspace_nearly_full", "layer": layer, "share": share})
        self._extensions += 1
        self.epsilon = min(1.0, self.epsilon + self.epsilon_increment)

    def _estimate(self, layer: str, answers: Sequence[Answer], query: Query, device: torch.device) -> Found:
        if self.variant == "official":
            return from_official(answers, layer, self.epsilon, device)
        if self.method == "sketch":
            return from_sketches(answers, layer, self.epsilon, device)
        if self.method == "range_finder":
            return from_ranges(answers, layer, self.epsilon, device, query.request[f"{layer}/draw"])
        return from_grams(answers, layer, self.epsilon, device, self.basis(layer))

    def _fits(self, answer: Answer) -> bool:
        """Whether an answer has just the tensors, of just the shapes, that were asked for."""
        expected: dict[str, tuple[int, ...]] = {}
        for layer, weight in self._weights.items():
            count = inputs(weight)
            if self.sketches or self.method == "range_finder":
                expected[f"{layer}/{'sketch' if self.sketches else 'range'}"] = (count, self._width(layer))
                expected |= {f"{layer}/energy": (1,), f"{layer}/residual": (1,)}
            else:
                expected[f"{layer}/gram"] = (count, count)
        return {name: tuple(tensor.shape) for name, tensor in answer.tensors.items()} == expected

    def notes(self) -> list[dict[str, Any]]:
        """Return since the last call: layers that are more than 90 % frozen now, sketches too narrow for epsilon."""
        notes, self._notes = self._notes, []
        return notes

    def metrics(self) -> dict[str, float]:
        """Return ``rank/<layer>``, ``frozen_share/<layer>`` (rank over inputs), epsilon, and how often it all grew."""
        numbers = {"epsilon": self.epsilon, "answers_ignored": float(self._ignored)}
        numbers["extensions"] = float(self._extensions)
        for layer, weight in self._weights.items():
            rank = self.basis(layer).shape[1]
            numbers |= {f"rank/{layer}": float(rank), f"frozen_share/{layer}": rank / inputs(weight)}
        return numbers

    def state_dict(self) -> dict[str, Any]:
        """Return bases by layer, epsilon, and the counts of extensions and of ignored answers."""
        return {
            "bases": dict(self._bases),
            "epsilon": self.epsilon,
            "answers_ignored": self._ignored,
            "extensions": self._extensions,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore them."""
        self._bases = dict(state["bases"])
        self.epsilon, self._ignored = float(state["epsilon"]), int(state["answers_ignored"])
        self._extensions = int(state["extensions"])

    def forget(self, request: ForgetRequest) -> Residual:
        """Say that directions found in sums over clients stay: nobody's share can be taken out of a basis."""
        if not self._bases:
            return super().forget(request)
        why = "the bases span principal layer inputs summed over clients and tasks; no part of them is the forget set's"
        return Residual(type(self).__name__, "remains", why)
