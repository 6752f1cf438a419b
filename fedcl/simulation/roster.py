"""Which of Flower's nodes is which client now: devices say hello, come and go, and come back as another node.

Every client has one number for the whole run, its *slot*.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence

from flwr.app import Message
from flwr.serverapp import Grid

from fedcl.config.value_rules import ConfigError
from fedcl.contracts.fields import clean
from fedcl.messages import MESSAGE_TYPE, hello_content, read_hello
from fedcl.server.selection import client_order

FIRST_SLOT = 1 << 20
JOIN_SECONDS = 300.0
POLL_SECONDS = 0.5


class Roster:
    """The slots of clients, and the node behind each; parameters as of :class:`~fedcl.simulation.fleet.FleetGrid`.

    ``event`` records an event of a kind with fields.
    """

    def __init__(
        self,
        grid: Grid,
        clients: Sequence[str],
        *,
        note: str,
        code: str,
        base: str,
        owner: Callable[[int], str | None] | None,
        say: Callable[[str], None],
        event: Callable[..., None],
    ) -> None:
        self._grid, self._note, self._code, self._base, self._owner = grid, note, code, base, owner
        self._say, self._event = say, event
        ordered = sorted(clients, key=client_order)
        self.slots: Mapping[str, int] = {client: FIRST_SLOT + place for place, client in enumerate(ordered)}
        self.clients = {slot: client for client, slot in self.slots.items()}
        self._node_at: dict[int, int] = {}  # slot -> Flower's node
        self._greeted: set[int] = set()  # nodes that have been asked who they are
        self._others: set[str] = set()  # clients that came and take no part in this run
        self._hellos: dict[str, int] = {}  # hellos under way -> node

    def node_at(self, slot: int) -> int | None:
        """Return the node behind a slot, None while it is free."""
        return self._node_at.get(slot)

    def hello(self, node: int) -> Message:
        """Return the message that asks a node which client it is."""
        return Message(hello_content(self._note), dst_node_id=node, message_type=MESSAGE_TYPE["hello"])

    def join(self, *, at_least: int, seconds: float, left: Collection[str], while_waiting: Callable[[], None]) -> None:
        """Wait until every client but those that ``left`` has said hello; after ``seconds`` go on with ``at_least``.

        Raises
        ------
        ConfigError
            If too few come in time, two call themselves the same, one has another version of fedcl or other fixed
            tensors, or refuses the run.
        """
        deadline = time.monotonic() + seconds
        wanted = {client: slot for client, slot in self.slots.items() if client not in left}
        while True:
            self.greet(strict=True)
            while_waiting()
            missing = sorted((c for c, slot in wanted.items() if slot not in self._node_at), key=client_order)
            if not missing:
                return
            if time.monotonic() > deadline:
                if len(wanted) - len(missing) >= at_least:
                    return
                also = f"; others came: {', '.join(sorted(self._others))}" if self._others else ""
                raise ConfigError(f"clients {', '.join(missing)}: did not come within {seconds:.0f} s{also}")
            time.sleep(POLL_SECONDS)

    def greet(self, *, strict: bool) -> set[int]:
        """Ask new nodes who they are, read the replies of others, and return the nodes that are there.

        With ``strict``, a node that cannot take part raises a ConfigError; otherwise it is asked again later.
        """
        alive = set(self._grid.get_node_ids())
        self._greeted &= alive
        new = sorted(alive - self._greeted - set(self._node_at.values()))
        if new:
            ids = self._grid.push_messages([self.hello(node) for node in new])
            self._hellos |= {id_: node for id_, node in zip(ids, new, strict=False) if id_ is not None}
            self._greeted |= set(new)
        if self._hellos:
            for reply in self._grid.pull_messages(list(self._hellos)):
                node = self._hellos.pop(reply.metadata.reply_to_message_id)
                why = self._enter(node, reply, alive)
                if why is not None and strict and node in alive:
                    raise ConfigError(why)
                if why is not None:
                    self._greeted.discard(node)  # asked again when something is sent next
        return alive

    def _enter(self, node: int, reply: Message, alive: set[int]) -> str | None:
        """Give a node the slot of the client that it says it is; return why it cannot have it."""
        if reply.has_error():
            return f"node {node} does not answer: {clean(reply.error.reason or '')}"
        try:
            client, _, code, base = read_hello(reply.content)
        except ValueError as error:  # a node that is no device of fedcl
            self._event("hello_rejected", node=str(node), reason=clean(str(error)))
            return None
        if not self._is_of(node, client):
            whose = self._owner(node) if self._owner is not None else None
            key = "a key that is nobody's" if whose is None else f"the key of client {whose}"
            self._event("hello_rejected", node=str(node), reason=f"calls itself client {client}, and has {key}")
            return None
        slot = self.slots.get(client)
        if slot is None:
            self._others.add(client)
            return None
        if code != self._code:
            return f"client {client} has fedcl {code}, the server {self._code}"
        if base != self._base:
            return (
                f"client {client} has another base than the server: {_shown(base)} and {_shown(self._base)}; set "
                "pretrained in its client.yaml to the file of the run's model.pretrained"
            )
        taken = self._node_at.get(slot, node)
        if taken != node and taken in alive and self._is_of(taken, client):
            return f"two nodes call themselves client {client!r}"
        self._node_at[slot] = node
        self._say(f"{len(self._node_at)}/{len(self.slots)} devices joined")
        return None

    def _is_of(self, node: int, client: str) -> bool:
        return self._owner is None or self._owner(node) == client


def _shown(base: str) -> str:
    """Return a digest as people compare them."""
    return f"sha256 {base[:12]}" if base else "no fixed tensors"
