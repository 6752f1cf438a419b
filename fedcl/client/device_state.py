"""Client state on a device's disk, by run and client; it survives restarts of server and device.

``<folder>/<run>/<client>/visit_<n>.safetensors`` are the states (:mod:`fedcl.client.file_state`), beside them lie
``ledger.json`` (the newest message that changed state), ``agreed.json`` (the run's classes), ``config.json`` (the run's
configuration as this device composed it) and, once a client has left, ``left.json``.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

from fedcl.base.files import sync_folder, write_atomic
from fedcl.client.file_state import FileStateStore
from fedcl.client.state import NEVER
from fedcl.contracts.learner import State

KEEP_RUNS = 3  # runs whose state is kept: a run that is resumed much later must still find it
KEEP_VISITS = 6  # committed states kept: a server that falls back to an older checkpoint needs an older one
_RUN = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
_STATE = re.compile(r"visit_(\d+)\.safetensors")


class DeviceStateStore:
    """The state of one client in one run.

    Parameters
    ----------
    folder
        Holds the runs' folders.
    run
        The run's name, the same after each resume; letters, digits, ``_`` and ``-``.
    client
        The device's client id.

    Raises
    ------
    ValueError
        If ``run`` or ``client`` has other characters.
    """

    def __init__(self, folder: Path, run: str, client: str) -> None:
        if not _RUN.fullmatch(run):
            raise ValueError(f"run={run[:80]!r}: must be 1 to 64 letters, digits, '_' and '-'")
        self.folder, self.run, self.client = folder, run, client
        self._files = FileStateStore(folder / run)
        self._files.has(client, NEVER)  # rejects an id that cannot name a folder
        self._notes = folder / run / f"{client}.notes"

    # -- records of messages ------ ------------------------------------------------------------------------------------

    def enter(self, attempt: int, visit: int) -> None:
        """Record a message that changes state, before it does.

        ``attempt`` counts how often the server has started or resumed the run.

        Raises
        ------
        ValueError
            If the message has been here before, or comes from a server that has been replaced, or the client has left.
        """
        self.refuse_if_left()
        last = self._read("ledger.json")
        if last is not None:
            newest = (int(last["attempt"]), int(last["visit"]))
            if attempt < newest[0]:
                raise ValueError(f"client {self.client}: the message is of attempt {attempt}, the run at {newest[0]}")
            if attempt == newest[0] and visit <= newest[1]:
                raise ValueError(f"client {self.client}: visit {visit} was here before (the newest is {newest[1]})")
        self._write("ledger.json", {"attempt": attempt, "visit": visit})

    def has_left(self) -> bool:
        """Whether this client has left the run."""
        return self._read("left.json") is not None

    def refuse_if_left(self) -> None:
        """Raise ValueError if this client has left the run."""
        if self.has_left():
            raise ValueError(f"client {self.client} has left this run; it does not respond any more")

    def agree(self, text: str) -> None:
        """Keep what the hello message agreed on, and remove the states of old runs.

        Raises
        ------
        ValueError
            If the same run agreed on something else before.
        """
        before = self._read("agreed.json")
        if before is not None and before != json.loads(text):
            raise ValueError(f"client {self.client}: run {self.run} had other classes or samples before")
        self._write("agreed.json", json.loads(text))
        runs = [path for path in self.folder.iterdir() if path.is_dir() and path.name != self.run]
        runs.sort(key=lambda path: path.stat().st_mtime)
        for path in runs[: max(0, len(runs) + 1 - KEEP_RUNS)]:
            shutil.rmtree(path)

    def agreed(self) -> str:
        """Return what was agreed on.

        Raises
        ------
        ValueError
            If this run has never sent a hello message to this device.
        """
        found = self._read("agreed.json")
        if found is None:
            raise ValueError(f"client {self.client}: run {self.run} has never said hello to this device")
        return json.dumps(found)

    def kept_config(self, key: str) -> dict[str, Any] | None:
        """Return the configuration composed here for ``key``, or None (composing takes a second)."""
        found = self._read("config.json")
        return found["config"] if found is not None and found["key"] == key else None

    def keep_config(self, key: str, config: dict[str, Any]) -> None:
        """Keep the configuration composed for ``key``."""
        self._write("config.json", {"key": key, "config": config})

    # -- ClientStateStore ---------------------------------------------------------------------------------------------

    def load(self, client: str, visit: int) -> State:
        """Return the state staged by ``visit``; see :meth:`FileStateStore.load`."""
        return self._files.load(client, visit)

    def stage(self, client: str, visit: int, state: State) -> None:
        """Write ``state`` beside the committed one; see :meth:`FileStateStore.stage`."""
        self._files.stage(client, visit, state)

    def has(self, client: str, visit: int) -> bool:
        """Whether ``visit``'s state is here."""
        return self._files.has(client, visit)

    def commit(self, client: str, visit: int) -> None:
        """Drop all committed states but the newest few, and all from before a forget set was erased.

        A message that names a state this device does not have changes nothing here: it will be rejected.
        """
        home = self.folder / self.run / client
        if visit == NEVER or not self._files.has(client, visit) or not home.is_dir():
            return
        matches = {path: _STATE.fullmatch(path.name) for path in home.iterdir()}
        older = sorted(
            ((int(match[1]), path) for path, match in matches.items() if match and int(match[1]) < visit), reverse=True
        )
        forgot = self._read("forgot.json")
        floor = int(forgot["visit"]) if forgot is not None and visit >= int(forgot["visit"]) else NEVER
        for place, (number, path) in enumerate(older):
            if place >= KEEP_VISITS or number < floor:
                path.unlink(missing_ok=True)

    def forgot(self, visit: int) -> None:
        """Record that ``visit`` erased a forget set: once it is committed, no earlier state may stay."""
        self._write("forgot.json", {"visit": visit})

    def drop(self, client: str) -> None:
        """Erase the client's state in every run on this device, and record that it has left this run."""
        for run in self.folder.iterdir() if self.folder.is_dir() else ():
            if run.is_dir():
                FileStateStore(run).drop(client)
        self._write("left.json", {"run": self.run})

    def _read(self, name: str) -> dict[str, Any] | None:
        try:
            found: dict[str, Any] = json.loads((self._notes / name).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        return found

    def _write(self, name: str, note: dict[str, Any]) -> None:
        if not self._notes.is_dir():
            self._notes.mkdir(parents=True, mode=0o700)
            sync_folder(self._notes.parent)
        write_atomic(self._notes / name, json.dumps(note))
