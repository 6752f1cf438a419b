"""Unlearning requests handed in from outside: a file that anybody appends to, read between two rounds.

``requests.jsonl`` has one request a line. What a run has read of it, and before which round, goes into
``requests.taken.jsonl`` first: a run that is killed and resumed meets every request in the same round again.
"""

from __future__ import annotations

import errno
import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fedcl.base.files import sync_folder
from fedcl.contracts.requests import NAMES, ForgetRequest

try:
    import fcntl
except ImportError:
    fcntl = None  # type: ignore[assignment]

FILE = "requests.jsonl"
TAKEN = "requests.taken.jsonl"
_LOCKED = "config.yaml"  # is in every run's folder, and never written again
_asking: set[Path] = set()  # runs that this process asks alone
_KEYS = {"id", "scope", "overrides", *NAMES.values()}


@dataclass(frozen=True)
class Line:
    """A line of the file: what it asks for, and what is wrong with it if it cannot be read.

    ``overrides`` choose another unlearner than the run's, on a run that has ended.
    """

    request: ForgetRequest
    fault: str | None = None
    overrides: tuple[str, ...] = ()


def parse(text: str) -> Line:
    """Read one line.

    Raises
    ------
    ValueError
        If it is no request, saying why.
    """
    try:
        raw = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"is no JSON ({str(error)[:80]})") from error
    if not isinstance(raw, dict) or not {"id", "scope"} <= raw.keys() or not raw.keys() <= _KEYS:
        raise ValueError(f"must be an object with id and scope, and may have {', '.join(sorted(_KEYS))}")
    if not isinstance(raw["id"], str) or raw["scope"] not in list(NAMES):
        raise ValueError(f"id must be text, scope one of {', '.join(NAMES)}")
    lists: dict[str, Any] = {name: _list(raw, name, str if name == "clients" else int) for name in NAMES.values()}
    overrides = _list(raw, "overrides", str)
    return Line(ForgetRequest(id=raw["id"], scope=raw["scope"], **lists), overrides=overrides)


def _list(raw: dict[str, Any], name: str, kind: type) -> tuple[Any, ...]:
    values = raw.get(name, [])
    if not isinstance(values, list) or any(isinstance(v, bool) or not isinstance(v, kind) for v in values):
        raise ValueError(f"{name} must be a list of {'text' if kind is str else 'ints'}")
    return tuple(values)


def lines(folder: Path, until: int | None = None) -> list[Line]:
    """Return the whole lines among the first ``until`` bytes (None: all); one that is no request says so."""
    return list(_lines(_read(folder / FILE)[:until]))


def _lines(data: bytes) -> Iterator[Line]:
    for number, line in enumerate(data.split(b"\n")[:-1], start=1):
        if not line.strip():
            continue
        try:
            yield parse(line.decode())
        except ValueError as error:  # a UnicodeDecodeError is one
            # under a name that says which line it is: there is no other that can be trusted
            yield Line(ForgetRequest(f"line-{number}", "client"), f"{FILE} line {number}: {error}")


def hand_in(folder: Path, request: ForgetRequest, overrides: Sequence[str] = ()) -> None:
    """Append a request, durably and in one piece, whoever else is appending.

    Raises
    ------
    OSError
        If there is no room; what was written of it is refused as a line by its reader.
    """
    text = json.dumps({**asdict(request), **({"overrides": list(overrides)} if overrides else {})})
    _append(folder / FILE, text)


@contextmanager
def alone(folder: Path, *, quiet: bool = False) -> Iterator[None]:
    """Let no other process ask the run meanwhile, and wait, saying so, while another does.

    A run that ends takes it, too, so that no request comes between its last look and its ``STATUS``. The lock is on the
    run's ``config.yaml``, which nothing rewrites, and the system's: a process that dies leaves none. Within such a
    block another one of the same process does nothing. On Windows there is no such lock; there, ask one by one.
    """
    path = (folder / _LOCKED).resolve()
    if path in _asking or fcntl is None:
        yield
        return
    with path.open("r+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if not quiet:
                print(f"{folder}: another request is being served, waiting for it", file=sys.stderr, flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        _asking.add(path)
        try:
            yield
        finally:
            _asking.discard(path)


def _append(path: Path, text: str) -> None:
    descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o600)
    try:
        size, data = os.fstat(descriptor).st_size, f"{text}\n".encode()
        if size:
            os.lseek(descriptor, size - 1, os.SEEK_SET)
            if os.read(descriptor, 1) != b"\n":  # a writer died: its piece must not spoil this line
                data = b"\n" + data
        if os.write(descriptor, data) < len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    sync_folder(path.parent)


def _read(path: Path) -> bytes:
    return path.read_bytes() if path.is_file() else b""


class Inbox:
    """The requests handed in to the run in ``folder``, as its queue asks for them."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __call__(self, server_round: int) -> list[tuple[ForgetRequest, str | None]]:
        """Return all that was there before ``server_round``, each with what is wrong with it or None."""
        data, taken = _read(self._folder / FILE), self._taken()
        if not data:
            return []
        whole = data.rfind(b"\n") + 1
        if whole > max((size for _, size in taken), default=0):
            # never before what was taken already: a run that goes on from an earlier round has that still to come
            taken.append((max([server_round, *(at for at, _ in taken)]), whole))
            _append(self._folder / TAKEN, json.dumps(taken[-1]))
        until = max((size for at, size in taken if at <= server_round), default=0)
        return [(line.request, line.fault) for line in _lines(data[:until])]

    def _taken(self) -> list[tuple[int, int]]:
        """Return (round, bytes of the file that were there before it), leaving out what was never finished."""
        taken = []
        for line in _read(self._folder / TAKEN).split(b"\n")[:-1]:
            try:
                at, size = json.loads(line)
                taken.append((int(at), int(size)))
            except (ValueError, TypeError):
                continue  # torn by a kill before it counted
        return taken
