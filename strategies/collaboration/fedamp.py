"""FedAMP on the server: each client's model is drawn towards those of clients that are like it.

Huang et al., "Personalized Cross-Silo Federated Learning on Non-IID Data", AAAI 2021, equations (5) to (7):
u_i = xi_i1 w_1 + ... + xi_im w_m with xi_ij = alpha A'(||w_i - w_j||^2) for j != i, xi_ii = 1 - sum of the others, and
A(x) = 1 - exp(-x / sigma). The client half is FedProx's pull towards u_i with mu = lambda / alpha (equation 8).
"""

# K = clients known, P = length of the flat vector
from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from fedcl.contracts.requests import ErasureOutcome, ForgetRequest
from fedcl.contracts.strategy import GLOBAL, Collaboration, Target, Update
from fedcl.contracts.view import ServerView


def attention(models_KP: Tensor, sigma: float, alpha: float) -> Tensor:
    """Return xi (K, K) float64: rows sum to 1, no entry is negative.

    Where alpha is so large that the others' weights exceed 1 together, which the paper rules out, they are scaled to 1.
    """
    squared_KK = torch.stack([(models_KP - model).square().sum(1) for model in models_KP])
    xi_KK = (alpha / sigma * torch.exp(-squared_KK / sigma)).fill_diagonal_(0.0)
    xi_KK /= xi_KK.sum(1, keepdim=True).clamp_min(1.0)
    return xi_KK + torch.diag((1 - xi_KK.sum(1)).clamp_min(0.0))


class FedAMP(Collaboration):
    """Keep each client's last model and send it the mixture u_i.

    The global model is the round's mean by samples: nobody trains from it but clients that were never seen. Task heads
    and buffers that a client sends are mixed like everything else.

    Parameters
    ----------
    sigma
        Squared distance at which attraction has fallen to 1/e. Its scale is that of ||w_i - w_j||^2.
    alpha
        Step size; with ``sigma`` it bounds a neighbour's weight by alpha / sigma.
    """

    needs: ClassVar[Literal["sum", "stack"]] = "stack"
    personal: ClassVar[bool] = True

    def __init__(self, *, sigma: float = 1.0, alpha: float = 0.1) -> None:
        self.sigma = sigma
        self.alpha = alpha
        self._models: dict[str, Tensor] = {}
        self._own_share = 1.0

    def message_for(self, client: str, view: ServerView) -> tuple[Target, dict[str, Tensor]]:
        return (client if client in self._models else GLOBAL), {}

    def combine(self, updates: list[Update], view: ServerView) -> dict[Target, Tensor]:
        """Return the mean model and u_i for each client known, float64 (P,)."""
        if not updates:
            return {}
        self._models |= {update.client: update.model.clone() for update in updates}
        weights_K = torch.tensor([update.weight for update in updates], dtype=torch.float64)
        mean_P = weights_K @ torch.stack([update.model for update in updates]).double() / weights_K.sum()
        models_KP = torch.stack(list(self._models.values())).double()
        xi_KK = attention(models_KP, self.sigma, self.alpha)
        self._own_share = float(xi_KK.diagonal().mean())
        return {GLOBAL: mean_P, **dict(zip(self._models, xi_KK @ models_KP, strict=True))}

    def state_dict(self) -> dict[str, Any]:
        """Return the last model of every client seen, float32 (P,)."""
        return {"models": dict(self._models), "own_share": self._own_share}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._models, self._own_share = dict(state["models"]), state["own_share"]

    def forget(self, request: ForgetRequest) -> ErasureOutcome:
        """Drop the models of the clients that hold the forget set; all of them when the request names none.

        Those of other clients stay until they train again: they began at mixtures with the dropped ones.
        """
        named = request.clients or tuple(self._models)
        dropped = [client for client in named if self._models.pop(client, None) is not None]
        name = type(self).__name__
        if not dropped:
            return ErasureOutcome(name, "not applicable", "keeps no model of the clients concerned")
        why = f"the last model of {', '.join(dropped)} is dropped; mixtures follow at the next aggregation"
        if self._models:
            return ErasureOutcome(
                name, "retained", f"{why}; those of other clients, trained from mixtures with it, stay"
            )
        return ErasureOutcome(name, "reset", why)

    def metrics(self) -> dict[str, float]:
        """Return the mean weight of a client's own model in its mixture."""
        return {"own_share": self._own_share}
