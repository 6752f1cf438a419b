"""Where a client's own state is kept between messages, and when a new state becomes current.

State is kept by (client, visit), where ``visit`` is the number of the message. A message *stages* the state it ends
with. The state becomes current when the server says, with the next message, that it was committed. So a message that
was retried, rejected or lost leaves no trace.
"""

from __future__ import annotations

from typing import Protocol

from fedcl.contracts.learner import State

NEVER = -1  # the committed visit of a client none of whose updates has been accepted


class ClientStateStore(Protocol):
    """Client state by (client, visit)."""

    def load(self, client: str, visit: int) -> State:
        """Return the state staged by ``visit``; an empty one for :data:`NEVER`.

        Raises
        ------
        KeyError
            If that visit's state is not here.
        """
        ...

    def stage(self, client: str, visit: int, state: State) -> None:
        """Keep ``state`` beside the committed one until the server has decided."""
        ...

    def commit(self, client: str, visit: int) -> None:
        """Make ``visit``'s state current and drop every other one of the client."""
        ...

    def has(self, client: str, visit: int) -> bool:
        """Whether ``visit``'s state is here (that of :data:`NEVER` always is)."""
        ...

    def drop(self, client: str) -> None:
        """Erase everything about a client."""
        ...


class MemoryStateStore:
    """Client state in this process's memory."""

    def __init__(self) -> None:
        self._states: dict[str, dict[int, State]] = {}

    def load(self, client: str, visit: int) -> State:
        """Return the state staged by ``visit``."""
        if visit == NEVER:
            return {}
        return self._states[client][visit]

    def stage(self, client: str, visit: int, state: State) -> None:
        """Keep ``state`` for ``(client, visit)``; staging the same visit again replaces it."""
        self._states.setdefault(client, {})[visit] = state

    def commit(self, client: str, visit: int) -> None:
        """Drop every state of the client but that of ``visit``."""
        kept = self._states.get(client)
        if kept is None:
            return
        if visit in kept:
            self._states[client] = {visit: kept[visit]}
        else:
            del self._states[client]

    def has(self, client: str, visit: int) -> bool:
        """Whether ``visit``'s state is here (that of :data:`NEVER` always is)."""
        return visit == NEVER or visit in self._states.get(client, {})

    def drop(self, client: str) -> None:
        """Erase everything about a client."""
        self._states.pop(client, None)
