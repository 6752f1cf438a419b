"""Real devices behind Flower's grid: lost and over-size replies, nodes that come back, clients that leave."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

from flwr.app import Error, Message, Metadata
from flwr.serverapp import Grid

from fedcl.contracts.fields import clean, shown
from fedcl.contracts.requests import ForgetInstruction, ForgetRequest, outcomes_from
from fedcl.messages import MESSAGE_TYPE, Request, content_bytes, instruction, read_reply
from fedcl.server.selection import client_order
from fedcl.simulation.compat import NODE_UNAVAILABLE, reply_message, set_source
from fedcl.simulation.grid import ClientGrid
from fedcl.simulation.roster import JOIN_SECONDS, POLL_SECONDS, Roster

REPLY_TOO_LARGE = 100  # beyond Flower's own error codes
ERASE_SECONDS = 120.0
PROBE_SECONDS = 120.0
LOOK_SECONDS = 5.0
STALL_SECONDS = 180.0


class FleetGrid(ClientGrid):
    """Flower's grid, addressed by the clients' slots (:class:`~fedcl.simulation.roster.Roster`).

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
        Takes lines about the progress of the devices, for the person who waits.
    refusals
        Returns by client why the server refused requests of its device lately.
    owner
        Returns the client whose key a node has, or None; a node that says it is another client is refused. None: nodes
        are believed.
    """

    def __init__(
        self,
        grid: Grid,
        clients: Sequence[str],
        *,
        note: str = "",
        code: str = "",
        base: str = "",
        timeout: float | None = None,
        max_bytes: int = 1 << 29,
        owner: Callable[[int], str | None] | None = None,
        say: Callable[[str], None] = lambda line: None,
        refusals: Callable[[], Mapping[str, str]] = dict,
    ) -> None:
        self._grid, self._timeout, self._max_bytes = grid, timeout, max_bytes
        self._roster = Roster(grid, clients, note=note, code=code, base=base, owner=owner, say=say, event=self._event)
        self.nodes = dict(self._roster.slots)
        self._sent: dict[str, int] = {}  # messages under way -> slot
        self._probe_at: dict[str, tuple[float, float]] = {}  # messages under way -> when to ask after them, and again
        self._probes: dict[str, str] = {}  # hellos sent behind a message -> that message
        self._failed: dict[str, tuple[int, Error]] = {}
        self._metadata: dict[str, Metadata] = {}
        self._say, self._refusals = say, refusals
        self._said: set[str] = set()  # lines that are said once
        self._refused: dict[str, str] = {}
        self._look_at = self._stalls_at = 0.0  # when to look at refusals; when silence has lasted too long
        self._unheard: list[tuple[str, dict[str, Any]]] = []  # events from before anybody listened
        self._listener: Callable[..., None] | None = None

    def listen(self, listener: Callable[..., None]) -> None:
        """Let ``listener(kind, **fields)`` record every event, earlier ones too."""
        self._listener = listener
        for kind, fields in self._unheard:
            listener(kind, **fields)
        self._unheard.clear()

    def _event(self, kind: str, **fields: Any) -> None:
        if self._listener is None:
            self._unheard.append((kind, fields))
        else:
            self._listener(kind, **fields)

    def join(self, *, at_least: int, seconds: float = JOIN_SECONDS, left: Collection[str] = ()) -> None:
        """Wait for devices, as :meth:`Roster.join <fedcl.simulation.roster.Roster.join>`."""
        self._roster.join(at_least=at_least, seconds=seconds, left=left, while_waiting=lambda: self._watch(()))

    # -- Flower's Grid ------------------------------------------------------------------------------------------------

    def set_run(self, run: Any) -> None:
        """Set the run, as Flower's grids do."""
        self._grid.set_run(run)

    @property
    def run(self) -> Any:
        """The run this grid works for."""
        return self._grid.run

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Send messages and return their ids; one whose device is away gets an error as reply."""
        alive = self._roster.greet(strict=False)
        ids: list[str] = []
        for message in messages:  # one by one: Flower refuses a request whose messages together are too large
            slot = message.metadata.dst_node_id
            node = self._roster.node_at(slot)
            node = node if node in alive else None
            sent = copy.copy(message.metadata)  # before it is changed here
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
                lost = Error(NODE_UNAVAILABLE, "the device was started again, and has lost the message")
                replies.append(self._failure(id_, self._sent.pop(id_), lost))
        return replies

    def _say_once(self, line: str) -> None:
        if line not in self._said:
            self._said.add(line)
            self._say(line)

    def _watch(self, waiting: Sequence[str]) -> None:
        """Report refused replies, and a long silence."""
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
            silent = sorted({self._roster.clients[self._sent[id_]] for id_ in waiting}, key=client_order)
            self._say(f"no reply for {STALL_SECONDS:.0f} s; waiting for clients {', '.join(silent)}; see their logs")

    def _passed(self, waiting: Sequence[str]) -> set[str]:
        """Return the messages that a device has lost: it has replied to a later one, and works on them in order.

        Flower does not report a SuperNode that was killed and is back before its heartbeat was missed. Without this,
        what it worked on would be waited for until the message's time to live is over.
        """
        now = time.monotonic()
        for id_ in waiting:
            due, interval = self._probe_at[id_]
            node = self._roster.node_at(self._sent[id_])
            if now >= due and node is not None:
                self._probe_at[id_] = (now + 2 * interval, 2 * interval)
                pushed = self._grid.push_messages([self._roster.hello(node)])
                self._probes |= {str(one): id_ for one in pushed if one is not None}
        replies = self._grid.pull_messages(list(self._probes)) if self._probes else []
        behind = [(self._probes.pop(one.metadata.reply_to_message_id), one.has_error()) for one in replies]
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
        """Return a reply as from its client's slot, or why it is refused."""
        message_id = reply.metadata.reply_to_message_id
        slot = self._sent.pop(message_id, None)
        if slot is None:
            return reply  # from no client that was asked: the exchange rejects it by its node
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
        return reply_message(sent, message_id, "failed", slot, error)

    # -- leaving ------------------------------------------------------------------------------------------------------

    def erase(self, clients: Sequence[str]) -> list[str]:
        """Let the devices of departing clients erase their state; return the clients that could not be reached."""
        kind = MESSAGE_TYPE["forget"]
        messages = []
        for client in clients:
            note = ForgetInstruction((ForgetRequest("leave", "client", (client,)),), ())
            request = Request("forget", client, LEAVING, -1, -1, 0, None, note=note.to_json())
            messages.append(Message(instruction([request], None, None), self.nodes[client], kind))
        replies = self.send_and_receive(messages, timeout=ERASE_SECONDS)
        erased = {reply.metadata.src_node_id for reply in replies if not reply.has_error() and self._erased(reply)}
        return [client for client in clients if self.nodes[client] not in erased]

    def _erased(self, reply: Message) -> bool:
        """Whether a device says that it has erased its client's state."""
        try:
            found = [one.outcome for one in outcomes_from(read_reply(reply.content).note)]
            why = "" if found == ["erased"] else f"note: outcomes {shown(found)} must be ['erased']"
        except ValueError as error:
            why = str(error)
        if why:
            client = self._roster.clients.get(reply.metadata.src_node_id, "")
            self._event("reply_rejected", client=client, message="forget", reason=clean(why))
        return not why


LEAVING = 1 << 40  # a message number that no other one follows
