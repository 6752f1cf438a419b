"""What unlearners that move weights share at the server: rounds of an edit, and the mean of clients' changes."""

# P = length of the flat vector
from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from clients.unlearners.steps import responses_of
from fedcl.contracts.fields import Form
from fedcl.contracts.requests import ForgetRequest, Forgotten
from fedcl.contracts.strategy import GLOBAL
from fedcl.contracts.unlearner import Unlearner, UnlearnView
from fedcl.models.flat import Spec

if TYPE_CHECKING:
    from fedcl.contracts.strategy import Target
    from fedcl.contracts.view import Response


def moved(model: Tensor, responses: Sequence[Response]) -> Tensor:
    """Return ``model`` (P,) plus the mean of the clients' changes, weighted by their samples, summed in float64."""
    if not responses:
        return model
    mean = torch.zeros_like(model, dtype=torch.float64)
    add_mean(mean, responses, "change", [response.num_examples for response in responses])
    return (model.double() + mean).float()


def add_mean(change: Tensor, responses: Sequence[Response], name: str, weights: Sequence[float]) -> None:
    """Add the weighted mean of the tensors ``name`` to ``change`` (float64), in place; nothing without weights."""
    total = sum(weights)
    for response, weight in zip(responses, weights, strict=True):
        if weight:
            change += response.tensors[name].double() * (weight / total)


def summed(responses: Sequence[Response]) -> dict[str, Tensor]:
    """Return the float64 sums over clients of equally named tensors."""
    sums: dict[str, Tensor] = {}
    for response in responses:
        for name, tensor in response.tensors.items():
            sums[name] = sums[name] + tensor if name in sums else tensor.double()
    return sums


def num_parameters(spec: Spec) -> int:
    """Return the length of a model vector's head, before the buffers."""
    return max((tensor.stop for tensor in spec if tensor.kind == "parameter"), default=0)


def edited_targets(requests: Sequence[ForgetRequest], models: Mapping[Target, Tensor]) -> list[Target]:
    """Return the targets to edit: all but the own models of clients that leave, which go with them."""
    departing_clients = Forgotten(list(requests)).clients
    return [target for target in models if target not in departing_clients]


def users_of(target: Target, models: Mapping[Target, Tensor], view: UnlearnView) -> tuple[str, ...]:
    """Return the clients that may train ``target`` on what they retain.

    The global model is everybody's. A personal one, or a cluster's, is trained by the clients that would be sent it, so
    that it stays personal; everybody if there are none.
    """
    if target == GLOBAL:
        return view.clients
    users = tuple(client for client in view.clients if torch.equal(view.model_of(client), models[target]))
    return users or view.clients


@dataclass(kw_only=True, eq=False, repr=False)
class Averaged(Unlearner):
    """Rounds in which clients move a model on their own samples, and the server adds the mean of their changes.

    The same procedure is used for every target: the global model, and each personal or cluster model.

    Parameters
    ----------
    rounds
        How often the clients are asked; 0 changes nothing.
    """

    rounds: int

    def __post_init__(self) -> None:
        self._metrics: dict[str, float] = {}

    @property
    def response(self) -> Form:
        """What clients send in a round: their change and their number of steps, unless a subclass says more."""
        return responses_of("steps")

    def asked(self, target: Target, models: Mapping[Target, Tensor], view: UnlearnView) -> Sequence[str]:
        """Return the clients that take part in the edit of ``target``."""
        raise TypeError(f"{type(self).__name__} does not say whom it asks")

    def enclosed(self, original: Tensor, view: UnlearnView, number: int) -> dict[str, Tensor]:
        """Return what clients need in round ``number`` besides the model; ``original`` (P,) is where it began."""
        return {}

    def added(self, model: Tensor, responses: Sequence[Response]) -> Tensor:
        """Return ``model`` (P,) after a round."""
        return moved(model, responses)

    def unlearn(
        self, requests: Sequence[ForgetRequest], models: Mapping[Target, Tensor], view: UnlearnView
    ) -> dict[Target, Tensor]:
        """Edit every target by ``rounds`` rounds."""
        self._metrics = {}
        edited: dict[Target, Tensor] = {}
        for target in edited_targets(requests, models):
            model, clients = models[target], self.asked(target, models, view)
            for number in range(self.rounds):
                enclosed = self.enclosed(models[target], view, number)
                responses = view.ask("train", dict.fromkeys(clients, model), self.response, enclosed, round=number)
                model = self.added(model, responses)
                self._count(responses)
            edited[target] = model
        return edited

    def metrics(self) -> dict[str, float]:
        """Return the sums over all clients, rounds and targets of what they counted (steps, say)."""
        return dict(self._metrics)

    def _count(self, responses: Sequence[Response]) -> None:
        for response in responses:
            for name, tensor in response.tensors.items():
                if tensor.numel() == 1 and name != "change":
                    self._metrics[name] = self._metrics.get(name, 0.0) + float(tensor)


@dataclass(kw_only=True, eq=False, repr=False)
class Together(Averaged):
    """Rounds in which the owners of F train on F and R together and, with ``everyone``, the others on R.

    Parameters
    ----------
    rounds, epochs
        Rounds, and a client's epochs in each; 0 of either changes nothing.
    lr, batch_size
        Learning rate and batch size; None for the client's own.
    optimizer
        ``adam``, or ``sgd`` with the client's momentum and weight decay.
    everyone
        Whether clients that hold nothing of F take part.
    """

    rounds: int = 1
    epochs: int = 3
    lr: float | None = 0.001
    batch_size: int | None = None
    optimizer: str = "adam"
    everyone: bool = True

    def asked(self, target: Target, models: Mapping[Target, Tensor], view: UnlearnView) -> Sequence[str]:
        """Ask the owners of the forget set and, with ``everyone``, the model's users."""
        users = users_of(target, models, view) if self.everyone else ()
        return tuple(dict.fromkeys([*users, *view.owners]))
