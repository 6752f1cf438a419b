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
from fedcl.messages.partial_sums import partial_sum_content
from fedcl.server.aggregation import Aggregation
from fedcl.simulation.compat import CLIENT_RAISED


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a client sent no reply: one of Flower's error codes and a sentence."""

    code: int
    reason: str


Outcome = list[tuple[str, RecordDict | Failure]]  # replies by client, in the order of the instruction


@dataclass
class ClientHost:
    """A runtime and the states of the clients it has seen; with ``aggregation`` it sums blocks of replies itself."""

    runtime: ClientRuntime
    store: ClientStateStore
    aggregation: Aggregation | None = None

    def run(self, content: RecordDict) -> Iterator[tuple[str, RecordDict | Failure]]:
        """Run an instruction for each client it addresses and yield (client, reply).

        A client that raises costs its own reply, no other's.
        """
        for kind, group in groupby(requests(content), key=lambda request: request.kind):
            asked = list(group)
            if kind in CHANGES_STATE:
                for request in asked:
                    # a question may come while a later message waits to be committed: its state must stay
                    self.store.commit(request.client, request.committed)
            replies = self.runtime.train(asked, self.store) if kind == "train" else self._visits(asked)
            pairs = zip(asked, replies, strict=True)
            for number, members in groupby(pairs, key=lambda pair: pair[0].block):
                if number < 0 or self.aggregation is None:
                    for request, reply in members:
                        yield request.client, _content(reply)
                else:
                    yield from _summed(number, list(members), self.aggregation)

    def _visits(self, asked: Sequence[Request]) -> Iterator[Reply | Exception]:
        for request in asked:
            yield self._visit(request)

    def _visit(self, request: Request) -> Reply | Exception:
        try:
            return self.runtime.visit(request, self.store)
        except BaseException as error:
            return client_fault(error)


def _summed(number: int, members: Sequence[tuple[Request, Reply | Exception]], aggregation: Aggregation) -> Outcome:
    """Return one and the same partial sum for each client that is in it, and the replies of the others."""
    found = aggregation.partial_sum(number, [request for request, _ in members], [reply for _, reply in members])
    summed = {} if found is None else dict.fromkeys(found[1], partial_sum_content(*found))
    return [(request.client, summed.get(request.client) or _content(reply)) for request, reply in members]


def _content(reply: Reply | Exception) -> RecordDict | Failure:
    """Return a reply's content, or why there is none: what a client's code returns need not fit into a message."""
    if not isinstance(reply, Exception):
        try:
            return reply_content(reply, live=True)
        except Exception as error:
            reply = error
    return Failure(CLIENT_RAISED, clean(described(reply)))
