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
        raise Interrupted
    raise Terminated(128 + signum)


class Interrupted(KeyboardInterrupt):
    """A person has asked this process to stop at once."""


class Terminated(SystemExit):
    """The system has asked this process to stop at once."""


class ClientEnded(Exception):
    """A client's code has tried to end the process that it runs in."""


def client_fault(error: BaseException) -> Exception:
    """Return what a client's code has raised as its own failure, be it ``SystemExit`` or anything else.

    Raises
    ------
    BaseException
        ``error`` itself, if it is no fault of a client: somebody asks the process to stop.
    """
    if isinstance(error, Exception):
        return error
    # outside of `interruptible` it is Python that raises KeyboardInterrupt when somebody presses Ctrl-C
    pressed = isinstance(error, KeyboardInterrupt) and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if pressed or isinstance(error, (Interrupted, Terminated)):
        raise error
    return ClientEnded(described(error))


def described(error: BaseException) -> str:
    """Return an exception's name and text; a client's own exception may fail to say anything of itself."""
    try:
        return f"{type(error).__name__}: {error}"
    except BaseException as inner:
        client_fault(inner)
        return type(error).__name__
