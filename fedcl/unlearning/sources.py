"""Where unlearning requests come from: the configuration, or a file that anybody appends to while the run goes on.

A source is called before each round and returns every request that came before it, earlier ones among them, each with
what is wrong with it or None. ``requests.jsonl`` has one request a line. What a run has read of it, and before which
round, goes into ``requests.taken.jsonl`` first: a run that is killed and resumed finds every request in the same round
again.
"""

from __future__ import annotations

import errno
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

from fedcl.base.files import sync_folder
from fedcl.config.value_rules import ConfigError
from fedcl.contracts.requests import NAMES, ForgetRequest, Scope
from fedcl.scenario.task import Schedule

try:
    import fcntl
except ImportError:
    fcntl = None  # type: ignore[assignment]

FILE = "requests.jsonl"
TAKEN = "requests.taken.jsonl"
_LOCKED = "config.yaml"  # is in every run's folder, and never written again
_locked: set[Path] = set()  # runs that this process has locked

RequestSource = Callable[[int], Iterable[tuple[ForgetRequest, str | None]]]


# -- the configuration ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PlannedRequests:
    """Requests that are known before the run, each with the 0-based round before which it comes."""

    requests: Sequence[tuple[int, ForgetRequest]]

    def __call__(self, server_round: int) -> list[tuple[ForgetRequest, str | None]]:
        """Return the requests planned for before ``server_round``."""
        return [(request, None) for at, request in self.requests if at <= server_round]


_PLANNED_KEYS = {"id", "scope", "at", *NAMES.values()}


def planned_requests(rows: Sequence[Any], schedule: Schedule) -> PlannedRequests:
    """Read ``unlearning.requests`` of a configuration.

    ``at`` is ``{round: r}``, ``{task: t, round: k}`` (the k-th round of task t, 0-based; k is 0 by default)
    or ``end``.

    Raises
    ------
    ConfigError
        Naming the request and what is allowed.
    """
    if not isinstance(rows, Sequence) or isinstance(rows, str):
        raise ConfigError(f"unlearning.requests={rows}: must be a list of requests")
    planned = []
    for place, row in enumerate(rows):
        at = f"unlearning.requests[{place}]"
        if not isinstance(row, Mapping) or not {"scope", "at"} <= row.keys() or not row.keys() <= _PLANNED_KEYS:
            raise ConfigError(
                f"{at}={row}: must have scope and at, may have {', '.join(sorted(_PLANNED_KEYS - {'scope', 'at'}))}"
            )
        request = ForgetRequest(
            id=str(row.get("id", f"r{place}")),
            scope=cast(Scope, row["scope"]),
            clients=tuple(str(client) for client in _listed(row, "clients", (int, str), at)),
            classes=tuple(_listed(row, "classes", int, at)),
            samples=tuple(_listed(row, "samples", int, at)),
            tasks=tuple(_listed(row, "tasks", int, at)),
        )
        planned.append((_round(row["at"], schedule, f"{at}.at"), request))
    ids = [request.id for _, request in planned]
    twice = sorted({name for name in ids if ids.count(name) > 1})
    if twice:
        raise ConfigError(f"unlearning.requests: two have the id {twice[0]}")
    return PlannedRequests(planned)


def _listed(row: Mapping[str, Any], key: str, kind: Any, at: str) -> list[Any]:
    values = row.get(key, [])
    if isinstance(values, (int, str)):
        values = [values]
    if not isinstance(values, Sequence) or any(isinstance(v, bool) or not isinstance(v, kind) for v in values):
        what = "client ids" if key == "clients" else "ints"
        raise ConfigError(f"{at}.{key}={values}: must be a list of {what}")
    return list(values)


def _round(at: Any, schedule: Schedule, place: str) -> int:
    last = schedule.num_rounds
    if at == "end":
        return last
    if not isinstance(at, Mapping) or not at or not at.keys() <= {"task", "round"}:
        raise ConfigError(f"{place}={at}: must be {{round: r}}, {{task: t, round: k}} or end")
    if any(isinstance(value, bool) or not isinstance(value, int) or value < 0 for value in at.values()):
        raise ConfigError(f"{place}={dict(at)}: must be ints >= 0")
    if "task" not in at:
        if at["round"] > last:
            raise ConfigError(f"{place}.round={at['round']}: must be <= {last}, the rounds of the run")
        return int(at["round"])
    rounds = [r for r in range(last) if schedule.stage(r).index == at["task"]]
    if not rounds or at.get("round", 0) >= len(rounds):
        raise ConfigError(f"{place}={dict(at)}: there is no such round; the run has {last} rounds")
    return rounds[at.get("round", 0)]


# -- the file ---------------------------------------------------------------------------------------------------------

_LINE_KEYS = {"id", "scope", "overrides", *NAMES.values()}


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
        If it is not a valid request, naming the reason.
    """
    try:
        raw = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"is not valid JSON ({str(error)[:80]})") from error
    if not isinstance(raw, dict) or not {"id", "scope"} <= raw.keys() or not raw.keys() <= _LINE_KEYS:
        raise ValueError(f"must be an object with id and scope, and may have {', '.join(sorted(_LINE_KEYS))}")
    if not isinstance(raw["id"], str) or raw["scope"] not in list(NAMES):
        raise ValueError(f"id must be a string, scope one of {', '.join(NAMES)}")
    lists: dict[str, Any] = {name: _list(raw, name, str if name == "clients" else int) for name in NAMES.values()}
    overrides = _list(raw, "overrides", str)
    return Line(ForgetRequest(id=raw["id"], scope=raw["scope"], **lists), overrides=overrides)


def _list(raw: dict[str, Any], name: str, kind: type) -> tuple[Any, ...]:
    values = raw.get(name, [])
    if not isinstance(values, list) or any(isinstance(v, bool) or not isinstance(v, kind) for v in values):
        raise ValueError(f"{name} must be a list of {'strings' if kind is str else 'ints'}")
    return tuple(values)


def lines(folder: Path) -> list[Line]:
    """Return the complete lines of the file; a line that is not a valid request has a ``fault``."""
    return list(_lines(_read(folder / FILE)))


def _lines(data: bytes) -> Iterator[Line]:
    for number, line in enumerate(data.split(b"\n")[:-1], start=1):
        if not line.strip():
            continue
        try:
            yield parse(line.decode())
        except ValueError as error:  # a UnicodeDecodeError is one
            # identified by its line number, as nothing in the line can be trusted
            yield Line(ForgetRequest(f"line-{number}", "client"), f"{FILE} line {number}: {error}")


def submit(folder: Path, request: ForgetRequest, overrides: Sequence[str] = ()) -> None:
    """Append a request, durably and in one piece, even while other processes append.

    Raises
    ------
    OSError
        If there is no space left; the reader refuses the incomplete line.
    """
    text = json.dumps({**asdict(request), **({"overrides": list(overrides)} if overrides else {})})
    _append(folder / FILE, text)


@contextmanager
def exclusive(folder: Path, *, quiet: bool = False) -> Iterator[None]:
    """Lock the run against requests of other processes; wait, with a message unless ``quiet``, while another holds it.

    A run that ends takes the lock too, so that no request arrives between its last look and its ``STATUS``. It is a
    lock of the operating system on the run's ``config.yaml``, which is never rewritten, so a process that dies releases
    it. Nested use in one process does nothing. Windows has no such lock: submit requests one at a time there.
    """
    path = (folder / _LOCKED).resolve()
    if path in _locked or fcntl is None:
        yield
        return
    with path.open("r+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if not quiet:
                print(f"{folder}: another request is being processed, waiting for it", file=sys.stderr, flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        _locked.add(path)
        try:
            yield
        finally:
            _locked.discard(path)


def _append(path: Path, text: str) -> None:
    descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o600)
    try:
        size, data = os.fstat(descriptor).st_size, f"{text}\n".encode()
        if size:
            os.lseek(descriptor, size - 1, os.SEEK_SET)
            if os.read(descriptor, 1) != b"\n":  # a writer died: its incomplete line must not corrupt this one
                data = b"\n" + data
        if os.write(descriptor, data) < len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    sync_folder(path.parent)


def _read(path: Path) -> bytes:
    return path.read_bytes() if path.is_file() else b""


@dataclass(frozen=True)
class SubmittedRequests:
    """Requests that were submitted to the run in ``folder``."""

    folder: Path

    def __call__(self, server_round: int) -> list[tuple[ForgetRequest, str | None]]:
        """Return the requests that were in the file before ``server_round``."""
        data, taken = _read(self.folder / FILE), self._taken()
        if not data:
            return []
        whole = data.rfind(b"\n") + 1
        if whole > max((size for _, size in taken), default=0):
            # not before the last entry: a run resumed from an earlier round still has that entry ahead
            taken.append((max([server_round, *(at for at, _ in taken)]), whole))
            _append(self.folder / TAKEN, json.dumps(taken[-1]))
        until = max((size for at, size in taken if at <= server_round), default=0)
        return [(line.request, line.fault) for line in _lines(data[:until])]

    def _taken(self) -> list[tuple[int, int]]:
        """Return (round, bytes of the file that were there before it), without incomplete entries."""
        taken = []
        for line in _read(self.folder / TAKEN).split(b"\n")[:-1]:
            try:
                at, size = json.loads(line)
                taken.append((int(at), int(size)))
            except (ValueError, TypeError):
                continue  # cut short by a kill before it counted
        return taken
