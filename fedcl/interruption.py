"""Stopping a run without losing its round: the first signal asks, the second insists."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interruption:
    """Whether somebody has asked the run to stop."""

    def __init__(self) -> None:
        self.signal: int | None = None

    def raise_if_asked(self) -> None:
        """Stop here if a signal has come.

        Raises
        ------
        KeyboardInterrupt
            After SIGINT.
        SystemExit
            With status 143, after SIGTERM.
        """
        if self.signal is not None:
            _stop(self.signal)


@contextmanager
def interruptible(*, at_once: bool = False) -> Iterator[Interruption]:
    """Within this block SIGINT and SIGTERM are noted; a second one stops at once, and with ``at_once`` the first does.

    Outside the main thread, where signals cannot be handled, nothing changes.
    """
    interruption = Interruption()
    if threading.current_thread() is not threading.main_thread():
        yield interruption
        return

    def note(signum: int, frame: FrameType | None) -> None:
        if at_once or interruption.signal is not None:
            _stop(signum)
        interruption.signal = signum
        print("fedcl: finishing the round; once more stops at once", file=sys.stderr, flush=True)

    before = {signum: signal.signal(signum, note) for signum in SIGNALS}
    try:
        yield interruption
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def _stop(signum: int) -> None:
    if signum == signal.SIGINT:
        raise KeyboardInterrupt
    raise SystemExit(128 + signum)
