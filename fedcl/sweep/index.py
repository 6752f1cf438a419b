"""``sweep.json``: the jobs of a sweep and what became of each, whole at every moment."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from fedcl.base.files import write_atomic
from fedcl.config.value_rules import ConfigError
from fedcl.results import reading, schema
from fedcl.sweep.expansion import Job

_NAME = re.compile(r"[A-Za-z0-9_+-][A-Za-z0-9_.+-]*")  # a folder in the sweep's own


@dataclass
class Entry:
    """One job.

    ``status`` is waiting, running, done, failed or interrupted; ``error`` tells why it ended without being done, by the
    last line that it printed or a signal's name.
    """

    name: str
    overrides: tuple[str, ...]
    status: str = "waiting"
    error: str | None = None


@dataclass
class Index:
    """The jobs of the sweep in ``folder``."""

    folder: Path
    config_dirs: tuple[str, ...] = ()
    entries: list[Entry] = field(default_factory=list)

    @classmethod
    def read(cls, folder: Path) -> Index:
        """Read a sweep's index; an empty one if there is none.

        Raises
        ------
        ConfigError
            If the file is no index.
        """
        path = folder / schema.SWEEP
        raw = reading.mapping(path)
        if raw is None:
            return cls(folder)
        try:
            entries = [
                Entry(job["name"], tuple(job["overrides"]), job["status"], job.get("error")) for job in raw["jobs"]
            ]
            index = cls(folder, tuple(raw["config_dirs"]), entries)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(f"{path}: not a sweep's index, or damaged; choose another folder ({error})") from error
        texts = [*index.config_dirs, *(text for one in entries for text in (one.name, one.status, *one.overrides))]
        if not all(isinstance(text, str) for text in texts) or not all(_NAME.fullmatch(one.name) for one in entries):
            raise ConfigError(f"{path}: not a sweep's index, or damaged; choose another folder")
        return index

    def write(self) -> None:
        """Replace the file."""
        jobs = [asdict(entry) for entry in self.entries]
        text = json.dumps({"config_dirs": self.config_dirs, "jobs": jobs}, indent=2)
        write_atomic(self.folder / schema.SWEEP, text + "\n")

    def add(self, jobs: Sequence[Job]) -> list[Entry]:
        """Take in the jobs that are not there yet and return the entries of all of them.

        A job is the same if its overrides are, in whatever order.

        Raises
        ------
        ConfigError
            If another job has the folder that a new one would get: its fixed settings were others.
        """
        known = {frozenset(entry.overrides): entry for entry in self.entries}
        names = {entry.name: entry for entry in self.entries}
        asked = []
        for job in jobs:
            entry = known.get(frozenset(job.overrides))
            if entry is None and job.name in names:
                other = sorted(set(names[job.name].overrides) ^ set(job.overrides))
                raise ConfigError(
                    f"sweep_dir={self.folder}: its job {job.name} has other settings ({', '.join(other)}); choose "
                    "another folder"
                )
            if entry is None:
                entry = Entry(job.name, job.overrides)
                self.entries.append(entry)
            asked.append(entry)
        return asked

    def run_dir(self, entry: Entry) -> Path:
        """Return the folder of a job's run."""
        return self.folder / entry.name

    def log(self, entry: Entry) -> Path:
        """Return the file with what a job printed."""
        return self.folder / "logs" / f"{entry.name}.log"

    def is_done(self, entry: Entry) -> bool:
        """Whether a job needs no more: a run whose folder was removed is to be run again."""
        return entry.status == "done" and (self.run_dir(entry) / schema.SUMMARY).is_file()
