"""Runs instructions on simulated clients, in whatever process it lives: the same code inline and in a worker."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

from flwr.app import RecordDict

from fedcl.client.runtime import ClientRuntime
from fedcl.client.state import ClientStateStore
from fedcl.messages import CHANGES_STATE, Reply, Request, reply_content, requests
from fedcl.simulation.compat import CLIENT_RAISED


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a client did not answer: one of Flower's error codes and a sentence."""

    code: int
    reason: str


Outcome = list[tuple[str, RecordDict | Failure]]  # replies by client, in the order of the instruction


@dataclass
class ClientHost:
    """A runtime and the states of the clients it has met."""

    runtime: ClientRuntime
    store: ClientStateStore

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
            for request, reply in zip(asked, replies, strict=True):
                if isinstance(reply, Exception):
                    yield request.client, Failure(CLIENT_RAISED, f"{type(reply).__name__}: {reply}")
                else:
                    yield request.client, reply_content(reply, live=True)

    def _visits(self, asked: Sequence[Request]) -> Iterator[Reply | Exception]:
        for request in asked:
            try:
                yield self.runtime.visit(request, self.store)
            except Exception as error:
                yield error
