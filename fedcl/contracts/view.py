"""What server code of a method may know of a run, and ask its clients.

Model vectors are flat float32 tensors of shape (P,).
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from fedcl.contracts.fields import Form
from fedcl.models.flat import Spec


@dataclass(frozen=True)
class Query:
    """A question to clients.

    ``models`` maps each client to the vector (P,) of the model to answer it with; its order is the order of the
    responses. ``response`` declares every tensor of a response by name: a reply with any other one is rejected.
    ``request`` are tensors that are sent with the question.
    """

    name: str
    models: dict[str, Tensor]
    response: Form
    request: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Response:
    """A client's reply to a :class:`Query`."""

    client: str
    num_examples: int
    tensors: dict[str, Tensor]


class PresentView(Protocol):
    """What every view has."""

    @property
    def clients(self) -> tuple[str, ...]:
        """The clients that have not left the run, in canonical order."""
        ...

    @property
    def device(self) -> torch.device:
        """Device for heavy server mathematics."""
        ...

    def model_of(self, client: str) -> Tensor:
        """Return the weights that would be sent to ``client`` now, float32 (P,)."""
        ...

    def rng(self, purpose: str) -> torch.Generator:
        """Return a generator keyed by (seed, version, purpose)."""
        ...


class ServerView(PresentView, Protocol):
    """What a part may know of the server."""

    @property
    def global_model(self) -> Tensor:
        """Global weights, float32 (P,)."""
        ...

    @property
    def version(self) -> int:
        """Number of changes of the global model so far."""
        ...

    @property
    def now(self) -> float:
        """Time on the run's clock, in seconds."""
        ...

    @property
    def spec(self) -> Spec:
        """Layout of a model vector."""
        ...

    def model_at(self, target: str) -> Tensor:
        """Return the weights of ``target``, float32 (P,): the global ones if it has none of its own yet."""
        ...

    def compute(self, fn: Callable[..., Any], *args: Any) -> Future[Any]:
        """Run a pure function, perhaps in another process."""
        ...


class PastView(PresentView, Protocol):
    """What a part may know and ask once the run's models have been edited: for what it must learn again."""

    def ask_past(self, query: Query, server_round: int) -> list[Response]:
        """Put ``query`` to clients that took part in ``server_round``.

        Each responds from what it may still use of the task that it had then.
        """
        ...
