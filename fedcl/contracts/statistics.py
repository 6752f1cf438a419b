"""Sums of clients' statistics: queried when tasks end, added up exactly, sent to clients or written into the model.

A learner whose responses are plain sums over samples (class means, Gram matrices, importances) gives the same result as
if one client held all the data: the contract is :meth:`fedcl.contracts.learner.Plugin.solve`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from torch import Tensor

from fedcl.contracts.learner import Payload, Plugin
from fedcl.contracts.learner import overrides as defines
from fedcl.contracts.requests import ErasureOutcome, ForgetRequest, Forgotten
from fedcl.contracts.strategy import Target
from fedcl.contracts.view import Query, Response
from fedcl.models.flat import FlatModel
from fedcl.scenario.task import Task

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
        self._consumed: dict[str, dict[str, list[Task]]] = {name: {} for name in self._owners}
        self._free_of: set[tuple[str, str]] = set()  # (query, request) whose forget set is in no sum any more
        self.payloads: tuple[Payload, ...] = tuple(
            payload
            for plugin in plugins
            for payload in plugin.payloads
            if payload.name in plugin.sums and payload.direction == "down"
        )

    def queries(self, models: Mapping[str, Tensor]) -> list[Query]:
        """Return what to ask the clients whose task has ended, given the model (P,) each ended it with."""
        return [Query(name, dict(models), plugin.sums[name]) for name, plugin in self._owners.items()] if models else []

    def consume(self, query: Query, responses: Sequence[Response], tasks: Mapping[str, Task] | None = None) -> None:
        """Add the responses, in canonical client order; ``tasks`` are those whose samples they are sums over."""
        sums, consumed = self._sums[query.name], self._consumed[query.name]
        for response in responses:
            if tasks is not None:
                consumed.setdefault(response.client, []).append(tasks[response.client])
            for name, tensor in response.tensors.items():
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

    # -- for unlearners that can take sums apart ----------------------------------------------------------------------

    @property
    def names(self) -> tuple[str, ...]:
        """The queries whose responses are added up."""
        return tuple(self._owners)

    def sums(self, name: str) -> Sums:
        """Return the sums of query ``name`` by tensor name, float64; empty before the first task has ended."""
        return dict(self._sums[name])

    def consumed(self, name: str) -> dict[str, tuple[Task, ...]]:
        """Return, by client, the tasks whose samples are in the sums of query ``name``, one for each time they were."""
        return {client: tuple(tasks) for client, tasks in self._consumed[name].items()}

    def replace(self, name: str, sums: Sums, holders: Collection[str], requests: Sequence[ForgetRequest]) -> None:
        """Replace sums by ones of what ``holders`` may keep after ``requests``, which need not forget them any more."""
        after = Forgotten(list(requests))
        self._sums[name] = {tensor: value.double() for tensor, value in sums.items()}
        self._consumed[name] = {
            client: [after.task(client, task) for task in tasks]
            for client, tasks in self._consumed[name].items()
            if client in holders and client not in after.clients
        }
        self._free_of |= {(name, request.id) for request in requests}

    def message(self) -> dict[str, Tensor]:
        """Return the tensors that are sent with every train message, float32."""
        return {
            f"{payload.name}/{name}": tensor.float()
            for payload in self.payloads
            for name, tensor in self._sums[payload.name].items()
        }

    def state_dict(self) -> dict[str, Any]:
        """Return the sums, and whose samples are in them."""
        consumed = {
            name: {client: [task.to_json() for task in tasks] for client, tasks in held.items()}
            for name, held in self._consumed.items()
        }
        return {"sums": {name: dict(sums) for name, sums in self._sums.items()}, "absorbed": consumed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore them."""
        self._sums = {name: dict(state["sums"].get(name, {})) for name in self._owners}
        self._consumed = {
            name: {client: [Task.from_json(text) for text in tasks] for client, tasks in held.items()}
            for name in self._owners
            for held in (state["absorbed"].get(name, {}),)
        }

    def forget(self, request: ForgetRequest) -> ErasureOutcome:
        """Drop the sums that still hold the forget set: no client's share can be taken out of them."""
        if not any(self._sums.values()):
            return ErasureOutcome("Statistics", "not applicable", "keeps no sums")
        mixed = [name for name in self._owners if (name, request.id) not in self._free_of]
        for name in mixed:
            self._sums[name], self._consumed[name] = {}, {}
        if not mixed:
            return ErasureOutcome(
                "Statistics", "recomputed", f"sums of {', '.join(self._owners)}, without the forget set"
            )
        return ErasureOutcome("Statistics", "reset", f"sums of {', '.join(mixed)}, which hold all clients' shares")
