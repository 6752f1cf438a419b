"""Sums of clients' statistics: asked when tasks end, added up exactly, sent along or written into the model.

A learner whose answers are plain sums over samples (class means, Gram matrices, importances) comes out as if one client
held all the data, whoever holds which sample: the contract is :meth:`fedcl.client.plugin.Plugin.solve`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from fedcl.client.plugin import Payload, Plugin
from fedcl.client.plugin import overrides as defines
from fedcl.models.flat import FlatModel
from fedcl.requests import ForgetRequest, Residual
from fedcl.server.contracts import Answer, Query, Target

Sums = dict[str, Tensor]


class Statistics:
    """The running sums of a learner's plugins, by query and tensor name, in float64.

    ``model`` is what plugins write their solutions into: the run's architecture, its weights are scratch. Without
    plugins that have sums there is nothing to keep, and no model is needed.
    """

    def __init__(self, plugins: Sequence[Plugin] = (), model: FlatModel | None = None) -> None:
        self._owners = {name: plugin for plugin in plugins for name in plugin.sums}
        self._model = model
        self._sums: dict[str, Sums] = {name: {} for name in self._owners}
        self.payloads: tuple[Payload, ...] = tuple(
            payload
            for plugin in plugins
            for payload in plugin.payloads
            if payload.name in plugin.sums and payload.direction == "down" and payload.when == "every_train"
        )

    def queries(self, models: Mapping[str, Tensor]) -> list[Query]:
        """Return what to ask the clients whose task has ended, given the model (P,) each ended it with."""
        return [Query(name, dict(models)) for name in self._owners] if models else []

    def absorb(self, query: Query, answers: Sequence[Answer]) -> None:
        """Add the answers, in canonical client order."""
        sums = self._sums[query.name]
        for answer in answers:
            for name, tensor in answer.tensors.items():
                sums[name] = sums[name] + tensor.double() if name in sums else tensor.double()

    def solve(self, models: Mapping[Target, Tensor]) -> dict[Target, Tensor]:
        """Return the models (P,) with what the sums determine written into them; nothing where nobody solves."""
        solvers = [(name, plugin) for name, plugin in self._owners.items() if defines(plugin, "solve")]
        ready = [(name, plugin) for name, plugin in solvers if self._sums[name]]
        if not ready or self._model is None:
            return {}
        solved = {}
        for target, vector in models.items():
            self._model.load(vector)
            for name, plugin in ready:
                plugin.solve(self._model, self._sums[name])
            solved[target] = self._model.vector().cpu()
        return solved

    def message(self) -> dict[str, Tensor]:
        """Return what rides along with every train message, float32."""
        return {
            f"{payload.name}/{name}": tensor.float()
            for payload in self.payloads
            for name, tensor in self._sums[payload.name].items()
        }

    def state_dict(self) -> dict[str, Any]:
        """Return the sums."""
        return {name: dict(sums) for name, sums in self._sums.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore them."""
        self._sums = {name: dict(state.get(name, {})) for name in self._owners}

    def forget(self, request: ForgetRequest) -> Residual:
        """Say that sums keep what was added: nobody's share can be told apart."""
        if not any(self._sums.values()):
            return Residual("Statistics", "none", "keeps no sums")
        for name in self._sums:
            self._sums[name] = {}
        return Residual("Statistics", "reset", f"sums of {', '.join(self._owners)}, which hold all clients' shares")
