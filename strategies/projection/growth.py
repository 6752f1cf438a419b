"""The bases of FOT: how they grow with clients' responses, and how a client's share is taken out of them again."""

# D = inputs of a layer, K = rank of its basis, Q = columns of a sketch, N = new directions
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from fedcl.base.linalg import extend_basis
from fedcl.contracts.fields import NOTHING, Form, TensorField
from fedcl.contracts.requests import ErasureOutcome, ForgetRequest
from fedcl.contracts.strategy import Projection
from fedcl.contracts.view import PastView, Query, Response, ServerView
from fedcl.models.flat import TensorSpec
from strategies.projection.basis_memory import WHY, BasisMemory, Extension, UnlearnBasis
from strategies.projection.subspace import Found, from_grams, from_official, from_ranges, from_sketches, inputs

SUBSPACE = "subspace"
NEARLY_FULL = 0.9  # share of a layer's inputs that is frozen: above it a layer hardly learns
Variant = Literal["official", "corrected"]
Method = Literal["auto", "gram", "sketch", "range_finder"]


@dataclass(kw_only=True, eq=False, repr=False)
class GrowingBases(Projection):
    """An orthonormal basis for each layer, extended by what clients' responses hold outside of it.

    The parameters are those of :class:`~strategies.projection.fot.FOT`, which says when clients are asked, and what the
    bases are for.
    """

    epsilon: float = 0.9
    epsilon_increment: float = 0.0
    variant: Variant = "corrected"
    method: Method = "auto"
    sketch_width: int | None = None
    unlearn_basis: UnlearnBasis = "keep"

    def __post_init__(self) -> None:
        self._first_epsilon = self.epsilon
        self._weights: dict[str, TensorSpec] = {}
        self._bases: dict[str, Tensor] = {}
        self._extensions = 0
        self._memory = BasisMemory()
        self._stale = False  # whether the bases are to be asked for again
        self._notes: list[dict[str, Any]] = []

    @property
    def sketches(self) -> bool:
        """Whether clients send sketches with random numbers of their own."""
        return self.method == "sketch" or self.variant == "official"

    def basis(self, layer: str) -> Tensor:
        """Return the orthonormal basis (D, K) of ``layer``, float64 on the CPU; K = 0 before the first extension."""
        return self._bases.get(layer, torch.zeros(inputs(self._weights[layer]), 0, dtype=torch.float64))

    def _request(self, view: ServerView | PastView) -> dict[str, Tensor]:
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

    def _response(self) -> Form:
        """Return what a response must be: the tensors of the client side's summaries."""
        response: dict[str, TensorField] = {}
        energy = TensorField((1,), "float64", low=0.0)
        for layer, weight in self._weights.items():
            count = inputs(weight)
            if self.sketches or self.method == "range_finder":
                response[f"{layer}/{'sketch' if self.sketches else 'range'}"] = TensorField((count, self._width(layer)))
                response |= {f"{layer}/energy": energy, f"{layer}/residual": energy}
            else:
                response[f"{layer}/gram"] = TensorField((count, count))
        return response

    def _query(self, models: dict[str, Tensor], view: ServerView | PastView) -> Query:
        return Query(SUBSPACE, models, self._response(), self._request(view))

    def _extend(self, responses: Sequence[Response], query: Query, device: torch.device) -> dict[str, int]:
        """Extend the bases and return how many directions each layer has gained."""
        added = {}
        for layer, weight in self._weights.items():
            found = self._estimate(layer, responses, query, device)
            if found.short:
                self._notes.append({"kind": "sketch_too_narrow", "layer": layer, "width": self._width(layer)})
            before, extended = self.basis(layer), extend_basis(self.basis(layer), found.directions_DN.cpu())
            added[layer] = extended.shape[1] - before.shape[1]
            if extended.shape[1]:
                self._bases[layer] = extended
            share = extended.shape[1] / inputs(weight)
            if share > NEARLY_FULL >= before.shape[1] / inputs(weight):
                self._notes.append({"kind": "subspace_nearly_full", "layer": layer, "share": share})
        self._extensions += 1
        self.epsilon = min(1.0, self.epsilon + self.epsilon_increment)
        return added

    def _estimate(self, layer: str, responses: Sequence[Response], query: Query, device: torch.device) -> Found:
        if self.variant == "official":
            return from_official(responses, layer, self.epsilon, device)
        if self.method == "sketch":
            return from_sketches(responses, layer, self.epsilon, device)
        if self.method == "range_finder":
            return from_ranges(responses, layer, self.epsilon, device, query.request[f"{layer}/draw"])
        return from_grams(responses, layer, self.epsilon, device, self.basis(layer))

    def _remember(self, server_round: int, responses: Sequence[Response], added: dict[str, int]) -> None:
        if self.unlearn_basis != "keep":
            kept = tuple(responses) if self.unlearn_basis == "keep_grams" else ()
            clients = tuple(response.client for response in responses)
            self._memory.extensions.append(Extension(server_round, clients, added, kept))

    def _start_over(self) -> list[Extension]:
        """Return to no bases at all, and return the extensions there have been."""
        past = self._memory.extensions
        self._bases, self._extensions, self.epsilon, self._memory = {}, 0, self._first_epsilon, BasisMemory()
        return past

    def forget(self, request: ForgetRequest) -> ErasureOutcome:
        """Do with the bases what ``unlearn_basis`` says. They hold nobody's samples, but directions of their inputs.

        A request that names clients takes out all their responses, also if it asks for some of their samples only.
        For one that names none, only ``recompute`` works.
        """
        name, mode = type(self).__name__, self.unlearn_basis
        if not self._extensions:
            return super().forget(request)
        if mode == "recompute":
            self._stale = True
            return ErasureOutcome(name, "recomputed", WHY[mode])
        if mode == "keep":
            return ErasureOutcome(name, "retained", WHY[mode])
        concerned = set(request.clients)
        if not concerned:
            return ErasureOutcome(name, "retained", f"{WHY['keep']}; unlearn_basis=recompute asks for them again")
        if not concerned & self._memory.contributors():
            return ErasureOutcome(name, "not applicable", "the clients concerned have no share in the bases")
        return self._rebuild(concerned) if mode == "keep_grams" else self._drop(concerned)

    def _rebuild(self, concerned: set[str]) -> ErasureOutcome:
        for extension in self._start_over():
            for client in concerned:
                extension = extension.without(client)
            if extension.responses:
                query = Query(SUBSPACE, {}, NOTHING)
                added = self._extend(extension.responses, query, torch.device("cpu"))
                self._remember(extension.server_round, extension.responses, added)
        return ErasureOutcome(type(self).__name__, "recomputed", WHY["keep_grams"])

    def _drop(self, concerned: set[str]) -> ErasureOutcome:
        dropped, later = self._memory.drop_task(concerned, self._bases)
        self._extensions = len(self._memory.extensions)
        self.epsilon = min(1.0, self._first_epsilon + self._extensions * self.epsilon_increment)
        why = f"directions of {dropped} extensions are dropped, and with them what they protected"
        if later:
            why = f"{why}; later extensions stay, whose directions were looked for outside of the dropped ones"
            return ErasureOutcome(type(self).__name__, "retained", why)
        return ErasureOutcome(type(self).__name__, "reset", why)

    def relearn(self, view: PastView) -> None:
        """Ask the clients that stay for every past extension again: each with the samples that it had then."""
        if not self._stale:
            return
        self._stale = False
        for extension in self._start_over():
            models = {client: view.model_of(client) for client in extension.clients if client in view.clients}
            query = self._query(models, view)
            responses = view.ask_past(query, extension.server_round) if models else []
            if responses:
                added = self._extend(responses, query, view.device)
                self._remember(extension.server_round, responses, added)

    def state_dict(self) -> dict[str, Any]:
        """Return bases by layer, epsilon, and the count of extensions."""
        return {
            "bases": dict(self._bases),
            "epsilon": self.epsilon,
            "extensions": self._extensions,
            "memory": self._memory.state(),
            "stale": self._stale,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._bases = dict(state["bases"])
        self.epsilon = float(state["epsilon"])
        self._extensions = int(state["extensions"])
        self._memory, self._stale = BasisMemory.of(state.get("memory", {})), bool(state.get("stale", False))
