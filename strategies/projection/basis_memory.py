"""What FOT must remember of how its bases grew, so that a client's share of them can be taken out again."""

# D = inputs of a layer, K = rank of its basis, N = directions that an extension added
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

from fedcl.contracts.view import Response

UnlearnBasis = Literal["keep", "drop_task", "keep_grams", "recompute"]
WHY = {
    "keep": "the bases span principal layer inputs summed over clients and tasks; no part of them is the forget set's",
    "keep_grams": "the bases are those of the remaining clients' Gram matrices, which were read with models of then",
    "recompute": "the clients that stay are asked again for every past extension, with the edited models",
}


@dataclass
class Extension:
    """One extension of the bases: when it was, whose responses made it, and how many directions N a layer gained.

    ``responses`` are kept where bases are to be rebuilt from them, else there are none.
    """

    server_round: int
    clients: tuple[str, ...]
    added: dict[str, int]
    responses: tuple[Response, ...] = ()

    def without(self, client: str) -> Extension:
        """Return the extension as if ``client`` had not responded."""
        clients = tuple(one for one in self.clients if one != client)
        return Extension(
            self.server_round, clients, self.added, tuple(one for one in self.responses if one.client != client)
        )

    def num_bytes(self) -> int:
        """Return the size of the responses kept."""
        return sum(tensor.nbytes for response in self.responses for tensor in response.tensors.values())

    def state(self) -> dict[str, Any]:
        """Return the extension for a checkpoint."""
        responses = {a.client: {"num_examples": a.num_examples, "tensors": a.tensors} for a in self.responses}
        return {
            "server_round": self.server_round,
            "clients": list(self.clients),
            "added": dict(self.added),
            "responses": responses,
        }

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> Extension:
        """Read what :meth:`state` returned."""
        responses = (Response(c, int(a["num_examples"]), dict(a["tensors"])) for c, a in state["responses"].items())
        return cls(int(state["server_round"]), tuple(state["clients"]), dict(state["added"]), tuple(responses))


@dataclass
class BasisMemory:
    """The extensions so far, in order."""

    extensions: list[Extension] = field(default_factory=list)

    def contributors(self) -> set[str]:
        """Return the clients that have a share in the bases."""
        return {client for one in self.extensions for client in one.clients}

    def drop_task(self, clients: set[str], bases: dict[str, Tensor]) -> tuple[int, bool]:
        """Take out of ``bases`` (layer -> (D, K)), in place, what extensions with any of ``clients`` have added.

        Returns how many extensions were dropped, and whether one that stays came later: its directions were found
        outside of what was dropped.
        """
        dropped = [bool(clients & set(one.clients)) for one in self.extensions]
        for layer, basis_DK in list(bases.items()):
            parts, start = [], 0
            for one, drop in zip(self.extensions, dropped, strict=True):
                stop = start + one.added.get(layer, 0)
                parts += [] if drop else list(range(start, stop))
                start = stop
            if parts:
                bases[layer] = basis_DK[:, parts].clone()
            else:
                del bases[layer]
        later = any(dropped) and not all(dropped[dropped.index(True) :])
        self.extensions = [one for one, drop in zip(self.extensions, dropped, strict=True) if not drop]
        return sum(dropped), later

    def num_bytes(self) -> int:
        """Return the size of all responses kept."""
        return sum(one.num_bytes() for one in self.extensions)

    def state(self) -> dict[str, Any]:
        """Return the extensions for a checkpoint."""
        return {str(place): one.state() for place, one in enumerate(self.extensions)}

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> BasisMemory:
        """Read what :meth:`state` returned."""
        return cls([Extension.of(state[str(place)]) for place in range(len(state))])
