"""Runs instructions on simulated clients, in whatever process it lives: the same code inline and in a worker."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

from flwr.app import RecordDict

from fedcl.base.interruption import client_fault, described
from fedcl.client.runtime import ClientRuntime
from fedcl.client.state import ClientStateStore
from fedcl.contracts.fields import clean
from fedcl.messages import CHANGES_STATE, Reply, Request, reply_content, requests
from fedcl.messages.blocks import block_content
from fedcl.server.folding import Folding
from fedcl.simulation.compat import CLIENT_RAISED


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a client did not answer: one of Flower's error codes and a sentence."""

    code: int
    reason: str


Outcome = list[tuple[str, RecordDict | Failure]]  # replies by client, in the order of the instruction


@dataclass
class ClientHost:
    """A runtime and the states of the clients it has met; with ``folding`` it adds up blocks of replies itself."""

    runtime: ClientRuntime
    store: ClientStateStore
    folding: Folding | None = None

    def run(self, content: RecordDict) -> Iterator[tuple[str, RecordDict | Failure]]:
        """Run an instruction for each client it addresses and yield (client, reply).

        A client that raises costs its own reply, no other's.
        """
        for kind, group in groupby(requests(content), key=lambda request: request.kind):
            asked = list(group)
            if kind in CHANGES_STATE:
                for request in asked:
                    # a question may come while a later visit waits for the server's word: that one's state must stay
                    self.store.commit(request.client, request.committed)
            replies = self.runtime.train(asked, self.store) if kind == "train" else self._visits(asked)
            pairs = zip(asked, replies, strict=True)
            for number, members in groupby(pairs, key=lambda pair: pair[0].block):
                if number < 0 or self.folding is None:
                    for request, reply in members:
                        yield request.client, _content(reply)
                else:
                    yield from self._folded(number, list(members), self.folding)

    def _folded(self, number: int, members: Sequence[tuple[Request, Reply | Exception]], folding: Folding) -> Outcome:
        """Return a block's reply for each client that is in its sum, always the same, and what the others answered."""
        block = folding.block(number, [request for request, _ in members], [reply for _, reply in members])
        left = {} if block is None else dict.fromkeys(block[1], block_content(*block))
        return [(request.client, left.get(request.client) or _content(reply)) for request, reply in members]

    def _visits(self, asked: Sequence[Request]) -> Iterator[Reply | Exception]:
        for request in asked:
            yield self._visit(request)

    def _visit(self, request: Request) -> Reply | Exception:
        try:
            return self.runtime.visit(request, self.store)
        except BaseException as error:
            return client_fault(error)


def _content(reply: Reply | Exception) -> RecordDict | Failure:
    """Return a reply's content, or why there is none: what a client's code returns need not fit into a message."""
    if not isinstance(reply, Exception):
        try:
            return reply_content(reply, live=True)
        except Exception as error:
            reply = error
    return Failure(CLIENT_RAISED, clean(described(reply)))
