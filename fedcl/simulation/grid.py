"""Flower grids of our own: the same messages, without a SuperLink."""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from flwr.app import Error, Message, Metadata, RecordDict
from flwr.serverapp import Grid

from fedcl.client.state import ClientStateStore, MemoryStateStore
from fedcl.server.state import Compute, at_once
from fedcl.simulation.compat import NODE_UNAVAILABLE, empty_run, reply_message
from fedcl.simulation.host import ClientHost, Failure, Outcome
from fedcl.simulation.jobs import without


class ClientGrid(Grid):
    """A grid that has one number for each client, whatever is behind it."""

    nodes: Mapping[str, int]

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """Return a message to one client."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> list[int]:
        """Return the number of every client, in canonical order."""
        return list(self.nodes.values())


class BaseGrid(ClientGrid):
    """Message ids, order and delivery; a subclass computes.

    A message may address a cohort: then the replies of its clients, or of blocks of them, are delivered all together.
    They come in the order in which messages were pushed, so that nothing depends on who finished first.
    """

    cohorts = True

    def __init__(self, nodes: Mapping[str, int], *, run_id: int = 1, states: ClientStateStore | None = None) -> None:
        self.nodes = dict(nodes)
        self.states = MemoryStateStore() if states is None else states
        self.run_id = run_id
        self.compute: Compute = at_once
        self._run = empty_run(run_id)
        self._next = 0
        self._sent: dict[str, Metadata] = {}
        self._done: dict[str, Outcome] = {}

    @abstractmethod
    def _submit(self, batch: list[tuple[str, RecordDict]]) -> None:
        """Take (message id, content) pairs to compute."""

    @abstractmethod
    def _progress(self, timeout: float | None) -> None:
        """Compute or wait, and put what is finished into ``_done``."""

    @abstractmethod
    def _cancel(self, clients: frozenset[str]) -> None:
        """Drop what is queued or being computed for ``clients``, and every copy of their states and samples."""

    def release(self, clients: Sequence[str]) -> None:
        """Drop the messages of ``clients`` and all copies of their states and samples.

        What is being computed is neither delivered nor staged. The states kept here, which count, stay.
        """
        dropped = frozenset(clients)
        for message_id, outcome in list(self._done.items()):
            left = [(client, reply) for client, reply in outcome if client not in dropped]
            if left:
                self._done[message_id] = left
            else:
                del self._done[message_id], self._sent[message_id]
        self._cancel(dropped)

    def erase(self, clients: Sequence[str]) -> None:
        """Drop everything about ``clients``: messages, copies, and their states."""
        self.release(clients)
        for client in clients:
            self.states.drop(client)

    def close(self) -> None:
        """Release processes and memory; the grid cannot be used afterwards."""

    def set_run(self, run: Any) -> None:
        """Set the run, as Flower's grids do."""
        self._run = run

    @property
    def run(self) -> Any:
        """The run this grid works for."""
        return self._run

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Accept messages and return their ids."""
        ids = []
        batch = []
        known = set(self.nodes.values())
        for message in messages:
            message_id = f"{self.run_id}-{self._next}"
            self._next += 1
            ids.append(message_id)
            self._sent[message_id] = message.metadata
            if message.metadata.dst_node_id in known:
                batch.append((message_id, message.content))
            else:
                self._done[message_id] = [("", Failure(NODE_UNAVAILABLE, "no such node"))]
        self._submit(batch)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Return the replies that are ready among ``message_ids``, waiting for one if there is none."""
        waiting = [message_id for message_id in message_ids if message_id in self._sent]
        if waiting and not any(message_id in self._done for message_id in waiting):
            self._progress(None)
        return [reply for message_id in waiting if message_id in self._done for reply in self._deliver(message_id)]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """Push messages and return their replies in push order; after ``timeout`` seconds, those that are there."""
        ids = self.push_messages(messages)
        deadline = None if timeout is None else time.monotonic() + timeout
        while any(message_id not in self._done for message_id in ids):
            left = None if deadline is None else deadline - time.monotonic()
            if left is not None and left <= 0:
                break
            self._progress(left)
        return [reply for message_id in ids if message_id in self._done for reply in self._deliver(message_id)]

    def _deliver(self, message_id: str) -> list[Message]:
        sent = self._sent.pop(message_id)
        replies = []
        outcomes, delivered = self._done.pop(message_id), set()
        for client, outcome in outcomes:
            if id(outcome) in delivered:
                continue  # one reply of several clients is delivered once
            delivered.add(id(outcome))
            source = self.nodes.get(client, sent.dst_node_id)
            content = Error(outcome.code, outcome.reason) if isinstance(outcome, Failure) else outcome
            replies.append(reply_message(sent, message_id, client, source, content))
        return replies


class InlineGrid(BaseGrid):
    """Clients in this process, one after another: plain tracebacks, no start-up, the reference for every other grid."""

    def __init__(self, nodes: Mapping[str, int], host: ClientHost, *, run_id: int = 1) -> None:
        super().__init__(nodes, run_id=run_id, states=host.store)
        self._host = host
        self._queue: list[tuple[str, RecordDict]] = []

    def _submit(self, batch: list[tuple[str, RecordDict]]) -> None:
        self._queue.extend(batch)

    def _progress(self, timeout: float | None) -> None:
        if self._queue:
            message_id, content = self._queue.pop(0)
            self._done[message_id] = list(self._host.run(content))

    def _cancel(self, clients: frozenset[str]) -> None:
        queue = [(message_id, without(content, clients)) for message_id, content in self._queue]
        self._queue = [(message_id, content) for message_id, content in queue if content is not None]
        for message_id, content in queue:
            if content is None:
                del self._sent[message_id]
        for client in clients:
            self._host.runtime.data.drop(client)
