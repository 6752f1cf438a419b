"""All messaging of the round loop: who is sent what, which replies are sound, and what becomes current.

Nothing else touches the grid, so validation, byte counts and the record of faults see everything.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any, Literal, Protocol

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid
from torch import Tensor

from fedcl.client.state import NEVER
from fedcl.contracts.fields import NOTHING, clean
from fedcl.contracts.learner import Payload
from fedcl.contracts.strategy import Query, Response
from fedcl.messages import CHANGES_STATE, CONFIG, MESSAGE_TYPE, Kind, Reply, Request, instruction, read_reply
from fedcl.messages.arrays import tensors_record, vector_record
from fedcl.messages.blocks import is_block, read_block
from fedcl.models.flat import Spec
from fedcl.scenario.task import Task
from fedcl.server.fold import BLOCK, RunningFold
from fedcl.server.strategy import Outgoing
from fedcl.server.validation import Expected, payload_norms, payload_outliers, rejection, uploads

COHORT = 64  # clients that one message addresses at most: the more of them, the less each of them costs
CommitState = Callable[[str, int], None]
TaskOf = Callable[[str], Task | None]
NoteOf = Callable[[str], str]
Recipients = Sequence[tuple[Outgoing, Request]]


def _no_note(client: str) -> str:
    return ""


class EventLog(Protocol):
    """Takes note of what went wrong."""

    def event(self, kind: str, *, round: int, virtual_time: float, **fields: Any) -> None:
        """Record one event."""
        ...


@dataclass(frozen=True, slots=True)
class Fault:
    """Why a client's reply cannot be used: ``client_failed`` when there is none, else ``reply_rejected``.

    The ``reason`` may be a client's own words: it is cleaned and cut here, before it goes anywhere.
    """

    event: Literal["client_failed", "reply_rejected"]
    reason: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "reason", clean(self.reason))


@dataclass
class Exchange:
    """Sends requests to clients and returns what they answered.

    ``visits`` counts how often each client was dispatched, ``turns`` how often to train; ``committed`` is its last
    accepted visit. ``cohorts`` says that the grid understands messages to several clients; ``commit_state`` tells a
    state store on this side that a visit counts, ``erase`` makes it and every worker drop all they keep of clients,
    ``release`` only what is under way, and the workers' copies.
    ``payloads`` declares what comes with every reply to a train message. ``num_tasks`` is that of
    :class:`~fedcl.server.validation.Expected`. ``max_update_norm`` is the largest L2 norm of a change that is let
    through; None for any. ``running`` adds up the blocks that come back folded. ``when``
    tells the present round and virtual time, for events; the server sets it. ``reasons`` says by client why its last
    reply could not be used, since it was cleared.
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
    running: RunningFold | None = None
    visits: dict[str, int] = field(default_factory=dict)
    turns: dict[str, int] = field(default_factory=dict)
    committed: dict[str, int] = field(default_factory=dict)
    bytes_up: int = 0
    bytes_down: int = 0
    when: Callable[[], dict[str, Any]] = dict
    reasons: dict[str, str] = field(default_factory=dict)

    @property
    def traffic(self) -> int:
        """Bytes of arrays sent and received so far."""
        return self.bytes_up + self.bytes_down

    def __post_init__(self) -> None:
        self._clients = {node: client for client, node in self.nodes.items()}
        self._plain: dict[Kind, Expected] = {}

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
        """Return the request for one client; one that changes its state takes the client's next visit number."""
        client = out.client
        visit, turn = self.visits.get(client, 0), self.turns.get(client, 0)
        if kind in CHANGES_STATE:
            self.visits[client] = visit + 1
        if kind == "train":
            self.turns[client] = turn + 1
        committed = self.committed.get(client, NEVER)
        out_of = (out.model, out.payload, turn, note, block)
        return Request(kind, client, visit, committed, server_round, version, task, name, *out_of)

    def push(self, recipients: Recipients) -> list[str]:
        """Send messages and return, for each recipient, the id of the message that carries its request."""
        groups = _whole_blocks(list(self._groups(recipients)))
        ids = self.grid.push_messages(self._messages(groups))
        return [message_id for group, message_id in zip(groups, ids, strict=True) for _ in group]

    def pull(self, message_ids: Iterable[str]) -> dict[str, Reply | Fault]:
        """Return by client the replies that are there; a grid of ours waits for one if there is none."""
        asked = sorted(message_ids)
        return self._read(self.grid.pull_messages(asked), asked)

    def sound(self, request: Request, reply: Reply | Fault | None) -> Reply | None:
        """Return the reply to a train request if it is fit to enter an aggregate; if not, record why."""
        if isinstance(reply, Reply) and reply.folded is not None:
            self.bytes_up += reply.num_bytes
            return reply  # judged where it was folded
        return self._accept(request, reply, self.expected("train"), self.max_update_norm)

    def commit(self, request: Request) -> None:
        """Let what the client staged at this visit become its state."""
        self.committed[request.client] = request.visit
        if self.commit_state is not None:
            self.commit_state(request.client, request.visit)

    def ask(
        self,
        query: Query,
        task_of: TaskOf,
        server_round: int,
        version: int,
        *,
        kind: Kind = "query",
        note_of: NoteOf = _no_note,
    ) -> list[Response]:
        """Put ``query`` to its clients; return the answers of those that hold data, in the query's order."""
        outgoing = [Outgoing(client, "", model, query.request) for client, model in query.models.items()]
        recipients = [
            (out, self._question(kind, out, task_of, server_round, version, query.name, note_of)) for out in outgoing
        ]
        replies, expected = self._send(recipients), Expected.of(kind, self.spec, query.response)
        responses = []
        for out, request in recipients:
            sound = self._accept(request, replies.get(out.client), expected)
            if sound is not None and sound.num_examples:
                responses.append(Response(out.client, sound.num_examples, sound.payload))
        self._note_outliers(query.name, responses, server_round)
        return responses

    def _note_outliers(self, name: str, responses: Sequence[Response], server_round: int) -> None:
        """Name the clients whose answer is far larger than the others', by itself and for their number of samples."""
        norms = {response.client: payload_norms(response.tensors) for response in responses}
        sizes = {response.client: response.num_examples for response in responses}
        for fields in payload_outliers(norms, sizes):
            fields["payload"] = f"{name}/{fields['payload']}"
            self._note("payload_outlier", round=server_round, **fields)

    def _question(
        self, kind: Kind, out: Outgoing, task_of: TaskOf, server_round: int, version: int, name: str, note_of: NoteOf
    ) -> Request:
        return self.request(kind, out, task_of(out.client), server_round, version, name, note_of(out.client))

    def tell(
        self,
        kind: Kind,
        outgoing: Sequence[Outgoing],
        task_of: TaskOf,
        server_round: int,
        version: int,
        note_of: NoteOf = _no_note,
    ) -> dict[str, Reply]:
        """Send a ``task_end``, a ``forget`` or an ``evaluate`` to clients; return the sound replies."""
        recipients = [(out, self._question(kind, out, task_of, server_round, version, "", note_of)) for out in outgoing]
        replies = self._send(recipients)
        sound = {}
        for out, request in recipients:
            reply = self._accept(request, replies.get(out.client), self.expected(kind))
            if reply is not None:
                sound[out.client] = reply
                if kind in CHANGES_STATE:
                    self.commit(request)
        return sound

    def _accept(
        self, request: Request, reply: Reply | Fault | None, expected: Expected, max_norm: float | None = None
    ) -> Reply | None:
        fault = Fault("client_failed", "no reply in time") if reply is None else reply
        if isinstance(fault, Reply):
            self.bytes_up += fault.num_bytes
            reason = rejection(fault, expected, base=request.model, max_norm=max_norm)
            if reason is None:
                return fault
            fault = Fault("reply_rejected", reason)
        where = {"round": request.server_round, "client": request.client, "visit": request.visit}
        self.reasons[request.client] = fault.reason
        self._note(fault.event, **where, message=request.kind, reason=fault.reason)
        return None

    def _note(self, kind: str, **fields: Any) -> None:
        self.log.event(kind, **{**self.when(), **fields})

    def _send(self, recipients: Recipients) -> dict[str, Reply | Fault]:
        """Exchange messages and wait for all replies; return them by client."""
        messages = self._messages(list(self._groups(recipients)))
        return self._read(self.grid.send_and_receive(messages=messages, timeout=self.timeout))

    def _read(self, messages: Iterable[Message], asked: Sequence[str] | None = None) -> dict[str, Reply | Fault]:
        """Return by client its first reply to one of the messages ``asked``, or what was wrong with it."""
        replies: dict[str, Reply | Fault] = {}
        for message in messages:
            client = self._clients.get(message.metadata.src_node_id, "")
            if not client:
                self._note("reply_rejected", client="", reason=f"unknown node {message.metadata.src_node_id}")
            elif asked is not None and message.metadata.reply_to_message_id not in asked:
                self._note("reply_rejected", client=client, reason="answers another message than those in flight")
            elif client in replies:
                self._note("reply_rejected", client=client, reason="a second reply to one message")
            elif not message.has_error() and self.cohorts and is_block(message.content):
                replies.update(self._block(message.content))
            elif message.has_error():
                replies[client] = Fault("client_failed", message.error.reason or f"error {message.error.code}")
            else:
                try:
                    replies[client] = read_reply(message.content)
                except ValueError as error:
                    replies[client] = Fault("reply_rejected", str(error))
        return replies

    def _block(self, content: RecordDict) -> dict[str, Reply]:
        sums, replies = read_block(content)
        if self.running is not None:
            self.running.add(sums)
        return replies

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
            self.bytes_down += len(group) * _num_bytes([record for record in (arrays, payload) if record is not None])
            first = requests[0]
            yield Message(content, dst_node_id=self.nodes[first.client], message_type=MESSAGE_TYPE[first.kind])

    def _groups(self, recipients: Recipients) -> Iterator[Recipients]:
        """Cut recipients into cohorts, and these into runs that share model, payload, config and task."""
        begin = 0
        for i in range(1, len(recipients) + 1):
            if i == len(recipients) or self._parts(recipients, begin, i):
                yield recipients[begin:i]
                begin = i

    def _parts(self, recipients: Recipients, begin: int, i: int) -> bool:
        """Whether the message that begins at ``begin`` must end before ``i``."""
        if not self.cohorts or not _alike(recipients[begin], recipients[i]):
            return True
        # at the limit it ends with a block, and one begins within the last places before the limit
        block, before = recipients[i][1].block, recipients[i - 1][1].block
        return i - begin >= COHORT - (BLOCK - 1 if block >= 0 else 0) and (block < 0 or block != before)


def _whole_blocks(groups: Sequence[Recipients]) -> list[Recipients]:
    """Return the messages with no block in two of them: of such a one each reply comes back by itself."""
    torn = {a[-1][1].block for a, b in pairwise(groups) if a[-1][1].block == b[0][1].block}
    torn.discard(-1)
    if not torn:
        return list(groups)
    return [
        [(out, replace(request, block=-1) if request.block in torn else request) for out, request in group]
        for group in groups
    ]


def _alike(a: tuple[Outgoing, Request], b: tuple[Outgoing, Request]) -> bool:
    (out_a, request_a), (out_b, request_b) = a, b
    return (
        out_a.model is out_b.model
        and out_a.payload.keys() == out_b.payload.keys()
        and all(tensor is out_b.payload[name] for name, tensor in out_a.payload.items())
        and out_a.config == out_b.config
        and request_a.task == request_b.task
        and request_a.note == request_b.note
        and (request_a.server_round, request_a.version) == (request_b.server_round, request_b.version)
    )


def _num_bytes(records: Iterable[ArrayRecord]) -> int:
    return sum(
        math.prod(array.shape) * np.dtype(array.dtype).itemsize for record in records for array in record.values()
    )
