"""Local training: nothing is shared. The baseline that a personalised method must beat."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch

from fedcl.contracts.requests import ErasureOutcome, ForgetRequest
from fedcl.contracts.strategy import GLOBAL, Collaboration, Target, Update
from fedcl.contracts.view import ServerView


class Local(Collaboration):
    """Send every client the model that it trained last; at first, the initial one.

    The global model is the plain mean of the round's models. Nobody trains from it: it is what averaging such models
    once would give.
    """

    needs: ClassVar[Literal["sum", "stack"]] = "stack"
    personal: ClassVar[bool] = True

    def __init__(self) -> None:
        self._clients: list[str] = []

    def message_for(self, client: str, view: ServerView) -> tuple[Target, dict[str, torch.Tensor]]:
        return (client if client in self._clients else GLOBAL), {}

    def combine(self, updates: list[Update], view: ServerView) -> dict[Target, torch.Tensor]:
        """Return the trained models and their mean; the first time also the initial model for all who wait."""
        if not updates:
            return {}
        models: dict[Target, torch.Tensor] = {}
        if not self._clients:
            models = dict.fromkeys(view.clients, view.global_model)
            self._clients = list(view.clients)
        models |= {update.client: update.model for update in updates}
        models[GLOBAL] = torch.stack([update.model for update in updates]).double().mean(0)
        return models

    def state_dict(self) -> dict[str, Any]:
        return {"clients": list(self._clients)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._clients = list(state["clients"])

    def forget(self, request: ForgetRequest) -> ErasureOutcome:
        """Drop the names of clients that leave: a client's model is its target, which an unlearner edits."""
        if request.scope == "client":
            self._clients = [client for client in self._clients if client not in request.clients]
        return ErasureOutcome(type(self).__name__, "not applicable", "keeps no model besides the targets")
