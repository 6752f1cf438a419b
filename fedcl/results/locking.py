"""One folder, one process: a lock that the operating system keeps, and releases when its process dies.

It is on the folder itself, which nobody can delete or replace under a run, and on the file ``.lock`` in it, for file
systems that lock plain files only (NFS). The file says who holds it. What is written there counts for nothing else: a
file that a killed process left behind locks nobody out.
"""

from __future__ import annotations

import errno
import json
import os
import shlex
import socket
import stat
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from fedcl.config.value_rules import ConfigError

try:
    import fcntl
except ImportError:  # Windows: there, nobody is kept out
    fcntl = None  # type: ignore[assignment]

FILE = ".lock"
_BUSY = (errno.EAGAIN, errno.EACCES)  # what is answered where another process holds the lock
_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.EBADF)  # of this file system
_LONGEST = 200  # characters that are told of a command
_PAUSE = 0.2  # seconds between two attempts of one that waits

_open: set[int] = set()  # descriptors that hold a lock


class Held(ConfigError):
    """Another process holds the folder; the message says which."""


@contextmanager
def hold(folder: Path, command: str = "", *, wait: bool = False) -> Iterator[tuple[int, ...]]:
    """Hold ``folder`` for this process alone, and yield the descriptors that do.

    A process that inherits them (``pass_fds``) holds it too; others that are started, by whatever means, do not.

    Parameters
    ----------
    folder
        An existing folder. It may be read-only: then the lock is on the folder alone.
    command
        What the next one is told that the holder does; the process's own command line without it.
    wait
        Wait for another holder, saying so on stderr, instead of refusing.

    Raises
    ------
    Held
        If another process, or another block of this one, holds it.
    ConfigError
        If the lock's file cannot be opened, since something else is in its place.
    """
    if fcntl is None:
        yield ()
        return
    told = False
    while (held := _acquire(folder)) is None:
        if not wait:
            raise Held(f"{folder}: {holder(folder)} is at work there; wait for it, or stop it first")
        if not told:
            print(f"{folder}: {holder(folder)} is at work there, waiting for it", file=sys.stderr, flush=True)
            told = True
        time.sleep(_PAUSE)
    try:
        _sign(held, command or _command())
        yield held
    finally:
        if len(held) > 1:
            os.ftruncate(held[1], 0)
        _close(held)


def holder(folder: Path) -> str:
    """Return in a few words who holds a folder, as far as its file tells."""
    try:
        text = (folder / FILE).read_bytes()[:4096].decode("utf-8", errors="replace")
        raw = json.loads(text)
        command, host, since = (_clean(raw[key]) for key in ("command", "host", "since"))
        return f"{command} (process {int(raw['pid'])} on {host}, since {since})"
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return "another process"


def _acquire(folder: Path) -> tuple[int, ...] | None:
    """Return the descriptors that hold the folder now, or None if another process does."""
    held: list[int] = []
    try:
        held.append(os.open(folder, os.O_RDONLY | os.O_CLOEXEC))
        if not _lock(held[0]):
            _close(held)
            return None
        file = _open_file(folder / FILE)
        if file is not None:
            held.append(file)
            if not _lock(file, else_warn=folder):
                _close(held)
                return None
    except BaseException:
        _close(held)
        raise
    _open.update(held)
    return tuple(held)


def _open_file(path: Path) -> int | None:
    """Return a descriptor of the lock's file, made where there is none; None in a folder that is read-only."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, 0o644)
    except OSError as error:
        if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
            return None
        raise ConfigError(f"{path}: cannot be locked ({error.strerror}); remove it") from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ConfigError(f"{path}: cannot be locked, it is not a regular file; remove it")
    return descriptor


def _lock(descriptor: int, *, else_warn: Path | None = None) -> bool:
    """Lock a descriptor; False if another process has. Where the file system knows no locks, nobody is kept out."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _BUSY:
            return False
        if error.errno not in _NO_LOCKS:
            raise
        if else_warn is not None:
            told = "its file system has no locks; take care that no second process works there"
            print(f"{else_warn}: {told}", file=sys.stderr, flush=True)
    return True


def _sign(held: tuple[int, ...], command: str) -> None:
    """Write into the lock's file who holds it."""
    if len(held) < 2:
        return
    who = {"pid": os.getpid(), "host": socket.gethostname(), "command": command}
    who["since"] = datetime.now(UTC).isoformat(timespec="seconds")
    os.ftruncate(held[1], 0)
    os.pwrite(held[1], f"{json.dumps(who)}\n".encode(), 0)


def _command() -> str:
    words = [Path(sys.argv[0]).name, *sys.argv[1:]] if sys.argv else ["python"]
    return shlex.join(["fedcl" if words[0] == "__main__.py" else words[0], *words[1:]])


def _clean(text: object) -> str:
    """Return text of somebody else's as one short line that a terminal only prints."""
    return "".join(c for c in " ".join(str(text).split()) if c.isprintable())[:_LONGEST]


def _close(descriptors: list[int] | tuple[int, ...]) -> None:
    for descriptor in descriptors:
        _open.discard(descriptor)
        os.close(descriptor)


def _forked() -> None:
    """Let go of what a forked child shares with its parent: it would outlive it."""
    for descriptor in list(_open):
        _close([descriptor])


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)
