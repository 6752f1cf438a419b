"""Devices read from a CSV file."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path

from fedcl.config.value_rules import show
from fedcl.simulation.profile import PARSED, DeviceProfile

_NUMBERS = [field.name for field in fields(DeviceProfile) if field.name != "step_seconds"]
_COLUMNS = ["client", *_NUMBERS]


class Trace:
    """Devices as a CSV file lists them.

    The file's first line names its columns: ``client``, and any of ``speed``, ``down``, ``up``, ``latency``,
    ``period``, ``duty``, ``phase``, ``dropout``. An absent column or an empty cell is as in :class:`DeviceProfile`.

    Parameters
    ----------
    path
        The file, UTF-8; rows of clients that the run does not have are allowed.
    recycle
        Give a client that the file does not list the row ``i mod rows``, ``i`` its position among the run's clients.
    step_seconds
        As in :class:`DeviceProfile`, for all.
    clients, seed
        The run's clients and seed.

    Raises
    ------
    ValueError
        For an unreadable file, an unknown or repeated column, a number that is none or out of range, a client that is
        repeated or, without ``recycle``, missing; naming file, line and column.
    """

    def __init__(
        self,
        *,
        clients: Sequence[str],
        seed: int,
        path: str | None = None,
        recycle: bool = False,
        step_seconds: float = 0.01,
    ) -> None:
        del seed
        if not path:
            raise ValueError(f"devices.path={show(path)}: must name a CSV file with the columns {', '.join(_COLUMNS)}")
        listed = _read_trace(Path(path), DeviceProfile(step_seconds=step_seconds))
        missing = [client for client in clients if client not in listed]
        if missing and not recycle:
            raise ValueError(
                f"devices.path={path}, column client: {len(missing)} of the run's clients are missing, "
                f"{missing[0]!r} first; add their rows, or set devices.recycle=true"
            )
        rows = list(listed.values())
        self._profiles = {c: listed.get(c, rows[i % len(rows)]) for i, c in enumerate(clients)}

    def profile(self, client: str) -> DeviceProfile:
        """Return the client's row; KeyError for who is none of the run's clients."""
        return self._profiles[client]


def _read_trace(path: Path, default: DeviceProfile) -> dict[str, DeviceProfile]:
    """Return client -> profile in the order of the file."""
    place = f"devices.path={path}"
    listed: dict[str, DeviceProfile] = {}
    try:
        # utf-8-sig: spreadsheets put a byte order mark in front.
        with path.open(newline="", encoding="utf-8-sig") as file:
            lines = csv.reader(file, strict=True)
            header = [name.strip() for name in next(lines, [])]
            _check_header(header, place)
            for row in lines:
                if not row:
                    continue
                line = f"{place}, line {lines.line_num}"
                if len(row) != len(header):
                    raise ValueError(f"{line}: has {len(row)} cells, the header has {len(header)}")
                cells = {name: cell.strip() for name, cell in zip(header, row, strict=True)}
                client = cells.pop("client")
                if not client or client in listed:
                    raise ValueError(f"{line}, column client: {client!r} is {'repeated' if client else 'no client'}")
                numbers = {name: _cell(name, text, line) for name, text in cells.items() if text}
                listed[client] = replace(default, **numbers)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{place}: cannot be read as CSV: {error}") from error
    if not listed:
        raise ValueError(f"{place}, line 2: the file lists no client")
    return listed


def _check_header(header: Sequence[str], place: str) -> None:
    for name in header:
        if name not in _COLUMNS:
            raise ValueError(f"{place}, line 1, column {name}: no such column; known: {', '.join(_COLUMNS)}")
        if header.count(name) > 1:
            raise ValueError(f"{place}, line 1, column {name}: is there twice")
    if "client" not in header:
        raise ValueError(f"{place}, line 1, column client: is missing")


def _cell(name: str, text: str, line: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise ValueError(f"{line}, column {name}: {text!r} is not a number") from None
    if name in ("down", "up") and value == math.inf:
        return value
    if not PARSED[name].accepts(value):
        raise ValueError(f"{line}, column {name}: {text} must be {PARSED[name].text.removesuffix(' or null')}")
    return value
