"""All messaging of the round loop: who is sent what, which replies are sound, and what becomes current.

Nothing else touches the grid, so validation, byte counts and the record of faults see everything.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message
from flwr.serverapp import Grid
from torch import Tensor

from fedcl.client.state import NEVER
from fedcl.contracts.fields import NOTHING, clean
from fedcl.contracts.learner import Payload
from fedcl.contracts.view import Query, Response
from fedcl.messages import CHANGES_STATE, CONFIG, MESSAGE_TYPE, Kind, Reply, Request, instruction, read_reply
from fedcl.messages.arrays import tensors_record, vector_record
from fedcl.messages.partial_sums import is_partial_sum, read_partial_sum
from fedcl.models.flat import Spec
from fedcl.scenario.task import Task
from fedcl.server.aggregation import PartialSums
from fedcl.server.cohorts import Recipients, cohorts
from fedcl.server.strategy import Outgoing
from fedcl.server.validation import Diverged, Expected, payload_norms, payload_outliers, rejection, uploads

CommitState = Callable[[str, int], None]
TaskOf = Callable[[str], Task | None]
NoteOf = Callable[[str], str]


class EventLog(Protocol):
    """Where events of a run are recorded."""

    def event(self, kind: str, *, round: int, virtual_time: float, **fields: Any) -> None:
        """Record one event."""
        ...


@dataclass(frozen=True, slots=True)
class Fault:
    """Why a client's reply cannot be used: ``client_failed`` when there is none, else ``reply_rejected``.

    The ``reason`` may be a client's own words: it is cleaned and cut here, before it goes anywhere. ``diverged`` is set
    where the reply shows that training has diverged.
    """

    event: Literal["client_failed", "reply_rejected"]
    reason: str
    diverged: Diverged | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "reason", clean(self.reason))


@dataclass
class Exchange:
    """Sends requests to clients and returns their replies.

    ``visits`` counts by client the messages that change its state, ``local_rounds`` its train messages; ``committed``
    is the number of the last one that was accepted. ``cohorts`` says that the grid understands messages to several
    clients. ``commit_state`` tells a state store on this side that a message counts; ``erase`` makes it and every
    worker drop all they keep of clients, ``release`` only what is under way, and the workers' copies. ``payloads``
    declares what comes with every reply to a train message, ``num_tasks`` is that of
    :class:`~fedcl.server.validation.Expected`. ``max_update_norm`` is the largest L2 norm of a change that is accepted;
    None for any. ``when`` returns the present round and virtual time, for events; the server sets it.
    """

    grid: Grid
    nodes: Mapping[str, int]
    spec: Spec
    log: EventLog
    payloads: Sequence[Payload] = ()
    cohorts: bool = False
    commit_state: CommitState | None = None
    erase: Callable[[Sequence[str]], Sequence[str] | None] | None = None
    release: Callable[[Sequence[str]], None] | None = None
    timeout: float | None = None
    max_update_norm: float | None = None
    num_tasks: int = 0
    visits: dict[str, int] = field(default_factory=dict)
    local_rounds: dict[str, int] = field(default_factory=dict)
    committed: dict[str, int] = field(default_factory=dict)
    bytes_up: int = 0
    bytes_down: int = 0
    when: Callable[[], dict[str, Any]] = dict

    def __post_init__(self) -> None:
        self._clients = {node: client for client, node in self.nodes.items()}
        self._plain: dict[Kind, Expected] = {}

    @property
    def traffic(self) -> int:
        """Bytes of arrays sent and received so far."""
        return self.bytes_up + self.bytes_down

    def expected(self, kind: Kind) -> Expected:
        """Return what a reply to a message of ``kind`` that asks no question must be."""
        if kind not in self._plain:
            form = uploads(self.payloads) if kind == "train" else NOTHING
            self._plain[kind] = Expected.of(kind, self.spec, form, self.num_tasks)
        return self._plain[kind]

    def request(
        self,
        kind: Kind,
        out: Outgoing,
        task: Task | None,
        server_round: int,
        version: int,
        name: str = "",
        note: str = "",
        block: int = -1,
    ) -> Request:
        """Return the request for one client; one that changes its state takes the client's next message number."""
        client = out.client
        visit, local_round = self.visits.get(client, 0), self.local_rounds.get(client, 0)
        if kind in CHANGES_STATE:
            self.visits[client] = visit + 1
        if kind == "train":
            self.local_rounds[client] = local_round + 1
        committed = self.committed.get(client, NEVER)
        rest = (out.model, out.payload, local_round, note, block)
        return Request(kind, client, visit, committed, server_round, version, task, name, *rest)

    # -- training: messages in flight --------------------------------------------------------------------------------

    def push(self, recipients: Recipients) -> list[str]:
        """Send messages and return, for each recipient, the id of the message that carries its request."""
        groups = self._groups(recipients)
        ids = self.grid.push_messages(self._messages(groups))
        return [message_id for group, message_id in zip(groups, ids, strict=True) for _ in group]

    def pull(self, message_ids: Iterable[str], partial: PartialSums | None = None) -> dict[str, Reply | Fault]:
        """Return by client the replies that are there; a grid of ours waits for one if there is none.

        ``partial`` takes the sums of blocks that were summed where they were made.
        """
        asked = sorted(message_ids)
        return self._read(self.grid.pull_messages(asked), asked, partial)

    def sound(self, request: Request, reply: Reply | Fault | None) -> Reply | Fault:
        """Return the reply to a train request if it is fit to enter an aggregate; if not, why, which is recorded."""
        if isinstance(reply, Reply) and reply.summed is not None:
            self.bytes_up += reply.num_bytes
            return reply  # validated where it was summed
        return self._accept(request, reply, self.expected("train"), self.max_update_norm)

    def commit(self, request: Request) -> None:
        """Commit the state that the client staged with this message."""
        self.committed[request.client] = request.visit
        if self.commit_state is not None:
            self.commit_state(request.client, request.visit)

    # -- questions and notices: messages that are waited for ---------------------------------------------------------

    def ask(
        self,
        query: Query,
        task_of: TaskOf,
        server_round: int,
        version: int,
        *,
        kind: Kind = "query",
        note_of: NoteOf = lambda client: "",
    ) -> list[Response]:
        """Put ``query`` to its clients; return the responses of those that hold data, in the query's order."""
        recipients = [
            (out, self.request(kind, out, task_of(out.client), server_round, version, query.name, note_of(out.client)))
            for out in (Outgoing(client, "", model, query.request) for client, model in query.models.items())
        ]
        replies = self._send(recipients, Expected.of(kind, self.spec, query.response))
        responses = [
            Response(request.client, reply.num_examples, reply.payload)
            for request, reply in replies
            if reply.num_examples
        ]
        self._note_outliers(query.name, responses, server_round)
        return responses

    def tell(
        self,
        kind: Kind,
        outgoing: Sequence[Outgoing],
        task_of: TaskOf,
        server_round: int,
        version: int,
        note_of: NoteOf = lambda client: "",
    ) -> dict[str, Reply]:
        """Send a ``task_end``, a ``forget`` or an ``evaluate`` to clients; return the sound replies."""
        recipients = [
            (out, self.request(kind, out, task_of(out.client), server_round, version, note=note_of(out.client)))
            for out in outgoing
        ]
        replies = self._send(recipients, self.expected(kind))
        if kind in CHANGES_STATE:
            for request, _ in replies:
                self.commit(request)
        return {request.client: reply for request, reply in replies}

    def _send(self, recipients: Recipients, expected: Expected) -> list[tuple[Request, Reply]]:
        """Exchange messages, wait for all replies, and return the sound ones."""
        messages = self._messages(self._groups(recipients))
        replies = self._read(self.grid.send_and_receive(messages=messages, timeout=self.timeout))
        accepted = [
            (request, self._accept(request, replies.get(request.client), expected)) for _, request in recipients
        ]
        return [(request, reply) for request, reply in accepted if isinstance(reply, Reply)]

    def _note_outliers(self, name: str, responses: Sequence[Response], server_round: int) -> None:
        """Name the clients whose response is far larger than the others', as a whole and for each of their samples."""
        norms = {response.client: payload_norms(response.tensors) for response in responses}
        sizes = {response.client: response.num_examples for response in responses}
        for fields in payload_outliers(norms, sizes):
            fields["payload"] = f"{name}/{fields['payload']}"
            self._note("payload_outlier", round=server_round, **fields)

    # -- from requests to messages, from messages to replies ---------------------------------------------------------

    def _accept(
        self, request: Request, reply: Reply | Fault | None, expected: Expected, max_norm: float | None = None
    ) -> Reply | Fault:
        fault = Fault("client_failed", "no reply in time") if reply is None else reply
        if isinstance(fault, Reply):
            self.bytes_up += fault.num_bytes
            rejected = rejection(fault, expected, base=request.model, max_norm=max_norm)
            if rejected is None:
                return fault
            fault = Fault("reply_rejected", rejected.reason, rejected.diverged)
        where = {"round": request.server_round, "client": request.client, "visit": request.visit}
        self._note(fault.event, **where, message=request.kind, reason=fault.reason)
        return fault

    def _note(self, kind: str, **fields: Any) -> None:
        self.log.event(kind, **{**self.when(), **fields})

    def _read(
        self, messages: Iterable[Message], asked: Sequence[str] | None = None, partial: PartialSums | None = None
    ) -> dict[str, Reply | Fault]:
        """Return by client its first reply to one of the messages ``asked``, or what was wrong with it."""
        replies: dict[str, Reply | Fault] = {}
        for message in messages:
            client = self._clients.get(message.metadata.src_node_id, "")
            if not client:
                self._note("reply_rejected", client="", reason=f"unknown node {message.metadata.src_node_id}")
            elif asked is not None and message.metadata.reply_to_message_id not in asked:
                self._note("reply_rejected", client=client, reason="replies to another message than those in flight")
            elif client in replies:
                self._note("reply_rejected", client=client, reason="a second reply to one message")
            elif not message.has_error() and self.cohorts and is_partial_sum(message.content):
                summed, members = read_partial_sum(message.content)
                replies.update(members)
                if partial is not None:
                    partial.add(summed)
            elif message.has_error():
                replies[client] = Fault("client_failed", message.error.reason or f"error {message.error.code}")
            else:
                try:
                    replies[client] = read_reply(message.content)
                except ValueError as error:
                    replies[client] = Fault("reply_rejected", str(error))
        return replies

    def _groups(self, recipients: Recipients) -> list[Recipients]:
        return cohorts(recipients) if self.cohorts else [[one] for one in recipients]

    def _messages(self, groups: Iterable[Recipients]) -> Iterator[Message]:
        records: dict[int, tuple[Tensor, ArrayRecord]] = {}
        for group in groups:
            out = group[0][0]
            if id(out.model) not in records:
                records[id(out.model)] = (out.model, vector_record(out.model, live=self.cohorts))
            arrays = records[id(out.model)][1]
            payload = tensors_record(out.payload, live=self.cohorts) if out.payload else None
            requests = [request for _, request in group]
            content = instruction(requests, arrays, payload)
            if out.config:
                content[CONFIG] = ConfigRecord(out.config)
            self.bytes_down += len(group) * sum(map(_num_bytes, (arrays, payload)))
            first = requests[0]
            yield Message(content, dst_node_id=self.nodes[first.client], message_type=MESSAGE_TYPE[first.kind])


def _num_bytes(record: ArrayRecord | None) -> int:
    arrays = () if record is None else record.values()
    return sum(math.prod(array.shape) * np.dtype(array.dtype).itemsize for array in arrays)
