"""Checkpoints of a running run: which round is due for one, and what it holds."""

from __future__ import annotations

import math
import time

from fedcl.client.state import NEVER, ClientStateStore
from fedcl.results.checkpoint import Checkpoints
from fedcl.results.recorder import Recorder
from fedcl.server.state import ServerData


class Saving:
    """Writes checkpoints every ``every`` rounds (0: none), but not before ``min_seconds`` after the last one."""

    def __init__(
        self, checkpoints: Checkpoints, recorder: Recorder, states: ClientStateStore, every: int, min_seconds: float
    ) -> None:
        self._checkpoints, self._recorder, self._states = checkpoints, recorder, states
        self._every, self._seconds = every, min_seconds
        self._saved = -math.inf

    def after_round(self, server: ServerData, server_round: int, *, last: bool, stopping: bool) -> None:
        """Write a checkpoint if one is due, if the run is over, or (even with ``every`` 0) if it is ``stopping``."""
        due = self._every and (server_round + 1) % self._every == 0 and time.monotonic() - self._saved >= self._seconds
        if due or (self._every and last) or stopping:
            self._save(server, server_round)
            self._saved = time.monotonic()

    def save_alone(self, server: ServerData) -> None:
        """Write a checkpoint between two rounds, and delete those before it."""
        if self._every and server.state.next_round:  # before the first round there is nothing to go back to
            self._save(server, server.state.next_round - 1, alone=True)

    def _save(self, server: ServerData, server_round: int, *, alone: bool = False) -> None:
        state = {"server": server.state_dict(), "offsets": self._recorder.flush()}
        state["digests"] = self._recorder.digests()
        committed = server.exchange.committed
        kept = {c: v for c, v in committed.items() if v != NEVER and self._states.has(c, v)}
        self._checkpoints.save(server_round, state, kept, self._states.load, alone=alone)
