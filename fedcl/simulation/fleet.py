"""Real devices behind Flower's grid: who is which client now, lost and over-size replies, nodes that come back.

Every client has one number for the whole run, its *seat*; which of Flower's nodes sits there may change.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

from flwr.app import Error, Message, Metadata, RecordDict
from flwr.serverapp import Grid

from fedcl.config.value_rules import ConfigError
from fedcl.contracts.fields import clean, shown
from fedcl.contracts.requests import ForgetInstruction, ForgetRequest, outcomes_from
from fedcl.messages import MESSAGE_TYPE, Request, content_bytes, hello_content, instruction, read_hello, read_reply
from fedcl.server.selection import client_order
from fedcl.simulation.compat import NODE_UNAVAILABLE, message_with, set_source

FIRST_SEAT = 1 << 20
REPLY_TOO_LARGE = 100  # beyond Flower's own error codes
JOIN_SECONDS = 300.0
ERASE_SECONDS = 120.0
POLL_SECONDS = 0.5
PROBE_SECONDS = 120.0
LOOK_SECONDS = 5.0
STALL_SECONDS = 180.0


class FleetGrid(Grid):
    """Flower's grid, addressed by seats.

    Parameters
    ----------
    grid
        Flower's own.
    clients
        The ids of the clients that take part.
    note
        What the run expects of a device, sent with the hello.
    code
        The version of fedcl that devices must have.
    timeout
        Seconds after which a message counts as lost, however alive its device; None: Flower's time to live, 12 hours.
    max_bytes
        A reply with more bytes is refused.
    say
        Takes the lines that tell whoever waits how far the devices are.
    refusals
        Returns why the server refused devices' requests lately, by client.
    owner
        Returns the client whose key a node has, or None; whoever says that it is another one is turned away. None:
        nodes are believed.
    """

    def __init__(
        self,
        grid: Grid,
        clients: Sequence[str],
        *,
        note: str = "",
        code: str = "",
        timeout: float | None = None,
        max_bytes: int = 1 << 29,
        owner: Callable[[int], str | None] | None = None,
        say: Callable[[str], None] = lambda line: None,
        refusals: Callable[[], Mapping[str, str]] = dict,
    ) -> None:
        self._grid, self._note, self._code = grid, note, code
        self._timeout, self._max_bytes, self._owner = timeout, max_bytes, owner
        ordered = sorted(clients, key=client_order)
        self.nodes: Mapping[str, int] = {client: FIRST_SEAT + place for place, client in enumerate(ordered)}
        self.samples: dict[str, int] = {}
        self._node_at: dict[int, int] = {}  # seat -> Flower's node
        self._greeted: set[int] = set()  # nodes that have been asked who they are
        self._others: set[str] = set()  # clients that came and take no part in this run
        self._hellos: dict[str, int] = {}  # hellos under way -> node
        self._sent: dict[str, int] = {}  # messages under way -> seat
        self._probe_at: dict[str, tuple[float, float]] = {}  # messages under way -> when to ask after them, and again
        self._probes: dict[str, str] = {}  # hellos sent behind a message -> that message
        self._failed: dict[str, tuple[int, Error]] = {}
        self._metadata: dict[str, Metadata] = {}
        self._say, self._refusals = say, refusals
        self._told: set[str] = set()  # what is said once
        self._refused: dict[str, str] = {}
        self._look_at = self._stalls_at = 0.0  # when to look at refusals; when it has been silent for too long
        self._unheard: list[tuple[str, dict[str, Any]]] = []  # events from before anybody listened
        self._listener: Callable[..., None] | None = None

    def listen(self, listener: Callable[..., None]) -> None:
        """Let ``listener(kind, **fields)`` know of every event, also of those that have been."""
        self._listener = listener
        for kind, fields in self._unheard:
            listener(kind, **fields)
        self._unheard.clear()

    def _event(self, kind: str, **fields: Any) -> None:
        if self._listener is None:
            self._unheard.append((kind, fields))
        else:
            self._listener(kind, **fields)

    # -- who is there -------------------------------------------------------------------------------------------------

    def join(self, *, at_least: int, seconds: float = JOIN_SECONDS, left: Collection[str] = ()) -> None:
        """Wait until every client but those that ``left`` has said hello; after ``seconds`` go on with ``at_least``.

        Raises
        ------
        ConfigError
            If too few come in time, two call themselves the same, one has another version of fedcl or refuses the run.
        """
        deadline = time.monotonic() + seconds
        wanted = {client: slot for client, slot in self.nodes.items() if client not in left}
        while True:
            self._greet(strict=True)
            self._watch(())
            missing = sorted((c for c, slot in wanted.items() if slot not in self._node_at), key=client_order)
            if not missing:
                return
            if time.monotonic() > deadline:
                if len(wanted) - len(missing) >= at_least:
                    return
                also = f"; others came: {', '.join(sorted(self._others))}" if self._others else ""
                raise ConfigError(f"clients {', '.join(missing)}: did not come within {seconds:.0f} s{also}")
            time.sleep(POLL_SECONDS)

    def _greet(self, *, strict: bool) -> set[int]:
        """Ask new nodes who they are, take in what earlier ones answered, and return the nodes that are there."""
        alive = set(self._grid.get_node_ids())
        self._greeted &= alive
        new = sorted(alive - self._greeted - set(self._node_at.values()))
        if new:
            kind = MESSAGE_TYPE["hello"]
            messages = [Message(hello_content(self._note), dst_node_id=node, message_type=kind) for node in new]
            ids = self._grid.push_messages(messages)
            self._hellos |= {id_: node for id_, node in zip(ids, new, strict=False) if id_ is not None}
            self._greeted |= set(new)
        if self._hellos:
            for reply in self._grid.pull_messages(list(self._hellos)):
                node = self._hellos.pop(reply.metadata.reply_to_message_id)
                self._slot(node, reply, alive, strict=strict)
        return alive

    def _slot(self, node: int, reply: Message, alive: set[int], *, strict: bool) -> None:
        why, client = None, ""
        if reply.has_error():
            why = f"node {node} does not answer: {clean(reply.error.reason or '')}"
        else:
            try:
                client, samples, code = read_hello(reply.content)
            except ValueError as error:  # a node that does not say who it is, in words of fedcl's, is nobody to us
                self._event("hello_rejected", node=str(node), reason=clean(str(error)))
                return
            if not self._is_of(node, client):
                whose = self._owner(node) if self._owner is not None else None
                key = "a key that is nobody's" if whose is None else f"the key of client {whose}"
                self._event("hello_rejected", node=str(node), reason=f"calls itself client {client}, and has {key}")
                return
            slot = self.nodes.get(client)
            if slot is None:
                self._others.add(client)
            elif code != self._code:
                why = f"client {client} has fedcl {code}, the server {self._code}"
            elif (taken := self._node_at.get(slot, node)) != node and taken in alive and self._is_of(taken, client):
                why = f"two nodes call themselves client {client!r}"
            else:
                self._node_at[slot] = node
                self.samples[client] = samples
                self._say(f"{len(self._node_at)}/{len(self.nodes)} devices joined")
        if why is not None and strict and node in alive:
            raise ConfigError(why)
        if why is not None:
            self._greeted.discard(node)  # asked again when something is sent next

    def _is_of(self, node: int, client: str) -> bool:
        return self._owner is None or self._owner(node) == client

    # -- Flower's Grid ------------------------------------------------------------------------------------------------

    def set_run(self, run: Any) -> None:
        """Set the run, as Flower's grids do."""
        self._grid.set_run(run)

    @property
    def run(self) -> Any:
        """The run this grid works for."""
        return self._grid.run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """Return a message to one seat."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> list[int]:
        """Return every seat, taken or not, in canonical client order."""
        return list(self.nodes.values())

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Send messages and return their ids; one whose device is away is answered with an error."""
        alive = self._greet(strict=False)
        ids: list[str] = []
        for message in messages:  # one by one: Flower refuses a request whose messages together are too large
            slot = message.metadata.dst_node_id
            node = self._node_at.get(slot)
            node = node if node in alive else None
            sent = metadata_of(message)
            pushed: list[Any] = []
            if node is not None:
                message.metadata.dst_node_id = node
                if self._timeout is not None:
                    message.metadata.ttl = self._timeout
                pushed = list(self._grid.push_messages([message]))
            if pushed and pushed[0] is not None:
                message_id = str(pushed[0])
                self._sent[message_id] = slot
                self._probe_at[message_id] = (time.monotonic() + PROBE_SECONDS, PROBE_SECONDS)
                self._say_once("first message sent")
                self._stalls_at = time.monotonic() + STALL_SECONDS
            else:
                message_id = f"unsent-{slot}-{time.monotonic_ns()}"
                why = "the device is not connected" if node is None else "Flower could not take the message"
                self._failed[message_id] = (slot, Error(NODE_UNAVAILABLE, why))
            self._metadata[message_id] = sent
            ids.append(message_id)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Return the replies that are ready among ``message_ids``."""
        asked = list(message_ids)
        replies = [self._failure(id_, *self._failed.pop(id_)) for id_ in asked if id_ in self._failed]
        waiting = [id_ for id_ in asked if id_ in self._sent]
        if waiting:
            self._watch(waiting)
            passed = self._passed(waiting)
            came = [self._checked(reply) for reply in self._grid.pull_messages(waiting)]
            if came:
                self._say_once("first reply")
                self._stalls_at = time.monotonic() + STALL_SECONDS
            replies += came
            for id_ in passed & self._sent.keys():
                gone = Error(NODE_UNAVAILABLE, "the device was started again, and has lost the message")
                replies.append(self._failure(id_, self._sent.pop(id_), gone))
        return replies

    def _say_once(self, line: str) -> None:
        if line not in self._told:
            self._told.add(line)
            self._say(line)

    def _watch(self, waiting: Sequence[str]) -> None:
        """Tell of replies that are refused, and of a long silence."""
        now = time.monotonic()
        if now < self._look_at:
            return
        self._look_at = now + LOOK_SECONDS
        refused = dict(self._refusals())
        for client, why in refused.items():
            if self._refused.get(client) != why:
                self._event("reply_refused", client=client, reason=clean(why))
                self._say(f"error: what client {client} sends is refused: {clean(why)}")
        self._refused = refused
        if waiting and now > self._stalls_at:
            self._stalls_at = now + STALL_SECONDS
            clients = {slot: client for client, slot in self.nodes.items()}
            silent = sorted({clients[self._sent[id_]] for id_ in waiting}, key=client_order)
            self._say(f"no reply for {STALL_SECONDS:.0f} s; waiting for clients {', '.join(silent)}; see their logs")

    def _passed(self, waiting: Sequence[str]) -> set[str]:
        """Return the messages behind which a later one has been answered: a node works on one after the other.

        Flower does not say that a SuperNode was killed and is back before its heartbeat was missed; what it worked on
        would be waited for until the message's time to live is over.
        """
        now = time.monotonic()
        for id_ in waiting:
            due, interval = self._probe_at[id_]
            node = self._node_at.get(self._sent[id_])
            if now >= due and node is not None:
                self._probe_at[id_] = (now + 2 * interval, 2 * interval)
                hello = Message(hello_content(self._note), dst_node_id=node, message_type=MESSAGE_TYPE["hello"])
                self._probes |= {str(one): id_ for one in self._grid.push_messages([hello]) if one is not None}
        answers = self._grid.pull_messages(list(self._probes)) if self._probes else []
        behind = [(self._probes.pop(one.metadata.reply_to_message_id), one.has_error()) for one in answers]
        return {id_ for id_, failed in behind if not failed}

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """Send messages and return their replies; after ``timeout`` seconds, those that are there."""
        waiting = set(self.push_messages(messages))
        deadline = None if timeout is None else time.monotonic() + timeout
        replies: list[Message] = []
        while waiting:
            came = self.pull_messages(waiting)
            replies += came
            waiting -= {reply.metadata.reply_to_message_id for reply in came}
            if not waiting or (deadline is not None and time.monotonic() > deadline):
                break
            time.sleep(POLL_SECONDS)
        return replies

    def _checked(self, reply: Message) -> Message:
        """Return a reply as from its client's seat, or why it is refused."""
        message_id = reply.metadata.reply_to_message_id
        slot = self._sent.pop(message_id, None)
        if slot is None:
            return reply  # of nobody we asked: the exchange refuses it by its node
        size = 0 if reply.has_error() else content_bytes(reply.content)
        if size > self._max_bytes:
            allowed = self._max_bytes >> 20
            why = f"a reply of {size} bytes: larger than backend.max_message_mb={allowed}"
            return self._failure(message_id, slot, Error(REPLY_TOO_LARGE, why))
        self._metadata.pop(message_id, None)
        self._probe_at.pop(message_id, None)
        set_source(reply, slot)
        return reply

    def _failure(self, message_id: str, slot: int, error: Error) -> Message:
        sent = self._metadata.pop(message_id)
        self._probe_at.pop(message_id, None)
        metadata = Metadata(
            run_id=sent.run_id,
            message_id=f"{message_id}/failed",
            src_node_id=slot,
            dst_node_id=sent.src_node_id,
            reply_to_message_id=message_id,
            group_id=sent.group_id,
            created_at=time.time(),
            ttl=sent.ttl,
            message_type=sent.message_type,
        )
        return message_with(metadata, error)

    # -- leaving ------------------------------------------------------------------------------------------------------

    def erase(self, clients: Sequence[str]) -> list[str]:
        """Let devices whose clients leave erase their state; return the clients that could not be reached."""
        kind = MESSAGE_TYPE["forget"]
        messages = []
        for client in clients:
            note = ForgetInstruction((ForgetRequest("leave", "client", (client,)),), ())
            request = Request("forget", client, LEAVING, -1, -1, 0, None, note=note.to_json())
            messages.append(Message(instruction([request], None, None), self.nodes[client], kind))
        replies = self.send_and_receive(messages, timeout=ERASE_SECONDS)
        told = {reply.metadata.src_node_id for reply in replies if not reply.has_error() and self._erased(reply)}
        return [client for client in clients if self.nodes[client] not in told]

    def _erased(self, reply: Message) -> bool:
        """Whether a device says that it has erased its client's state."""
        try:
            found = [residual.outcome for residual in outcomes_from(read_reply(reply.content).note)]
            why = "" if found == ["erased"] else f"note: outcomes {shown(found)} must be ['erased']"
        except ValueError as error:
            why = str(error)
        if why:
            client = next((c for c, slot in self.nodes.items() if slot == reply.metadata.src_node_id), "")
            self._event("reply_rejected", client=client, message="forget", reason=clean(why))
        return not why


LEAVING = 1 << 40  # a visit that no other one follows


def metadata_of(message: Message) -> Metadata:
    """Return a copy of what a message says of itself, before a grid changes it."""
    said = message.metadata
    return Metadata(
        run_id=said.run_id,
        message_id=said.message_id,
        src_node_id=said.src_node_id,
        dst_node_id=said.dst_node_id,
        reply_to_message_id=said.reply_to_message_id,
        group_id=said.group_id,
        created_at=said.created_at,
        ttl=said.ttl,
        message_type=said.message_type,
    )
