"""What a run is at the end of a round, and where its server computes."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from fedcl.server.contracts import Target

Compute = Callable[..., Future[Any]]


@dataclass
class ServerState:
    """What a run is at the end of a round: models by target, counters, and the next round to play.

    ``version`` counts changes of the global model; ``model_epoch`` counts edits that bypass the strategy; ``visited``
    are the clients that learned something of their present task; ``owed`` maps clients that were in flight when their
    task ended to the round that ended it, which they conclude when they are back; ``late`` are the clients that an old
    update of counted; ``untold`` are those that were out of reach when they were to forget.
    """

    models: dict[Target, Tensor]
    version: int = 0
    model_epoch: int = 0
    next_round: int = 0
    visited: set[str] = field(default_factory=set)
    owed: dict[str, int] = field(default_factory=dict)
    late: set[str] = field(default_factory=set)
    untold: set[str] = field(default_factory=set)


def at_once(fn: Callable[..., Any], *args: Any) -> Future[Any]:
    """Run ``fn`` here and now; its exception, if any, waits in the future."""
    future: Future[Any] = Future()
    try:
        future.set_result(fn(*args))
    except Exception as error:
        future.set_exception(error)
    return future
