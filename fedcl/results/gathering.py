"""Finding runs in folders, done or not, and putting those of one configuration together.

Only small files are read (``config.yaml``, ``summary.json``, ``STATUS``), so that a hundred runs are found at once.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedcl.config.value_rules import ConfigError
from fedcl.results import reading, schema
from fedcl.results.configurations import settings

_NOT_BEGUN = "not begun"
_UNKNOWN = f"its {schema.STATUS} is missing or damaged"
_TOLD = 3  # of many folders that an error is about


@dataclass
class Configuration:
    """The runs that are done of one configuration: their folders, and seed -> summary."""

    cfg: dict[str, Any]
    folders: list[Path] = field(default_factory=list)
    summaries: dict[int, dict[str, Any]] = field(default_factory=dict)


@dataclass
class Gathered:
    """What was found: configurations in the order of their runs, and what became of the other runs.

    ``unfinished`` maps a run's folder to its status, ``sweeps`` a sweep's folder to its jobs' names. A run that has the
    settings and seed of another is in ``doubles``.
    """

    configurations: list[Configuration] = field(default_factory=list)
    unfinished: dict[Path, str] = field(default_factory=dict)
    doubles: list[Path] = field(default_factory=list)
    sweeps: dict[Path, list[str]] = field(default_factory=dict)

    def left_out(self) -> list[str]:
        """Return what is left out and what to do about it: a line each sweep, a line each other run."""
        lines = [self._of_sweep(sweep, jobs) for sweep, jobs in self.sweeps.items() if self._open(sweep, jobs)]
        alone = [folder for folder in self.unfinished if folder.parent not in self.sweeps]
        lines += [f"{folder}: {self.advice(folder)}" for folder in alone]
        return lines + [f"{folder}: the same settings and seed as another run" for folder in self.doubles]

    def advice(self, folder: Path) -> str:
        """Return why a run is left out, and how to finish it."""
        status = self.unfinished[folder]
        if folder.parent in self.sweeps:
            return f"not done ({status}); fedcl sweep sweep_dir={folder.parent} goes on with it"
        if status == "running":
            return f"not done (running); wait for it or, if it was killed: fedcl resume {folder}"
        return f"not done ({status}); fedcl resume {folder} goes on with it"

    def _open(self, sweep: Path, jobs: Sequence[str]) -> list[Path]:
        return [folder for name in jobs if (folder := sweep / name) in self.unfinished]

    def _of_sweep(self, sweep: Path, jobs: Sequence[str]) -> str:
        """Return in one line how far a sweep has come that is not done."""
        left = self._open(sweep, jobs)
        counts = Counter(self.unfinished[folder] for folder in left)
        if len(left) <= _TOLD:
            how = ", ".join(f"{folder.name} {self.unfinished[folder]}" for folder in left)
        else:
            how = ", ".join(f"{count} {status}" for status, count in counts.items())
        return f"{sweep}: {len(left)} of {len(jobs)} jobs not done ({how}); fedcl sweep sweep_dir={sweep} goes on"


def gather(places: Sequence[Path]) -> Gathered:
    """Find all runs at or below several places.

    Raises
    ------
    ConfigError
        If a place holds none, or none is done.
    """
    found = Gathered(sweeps={place: list(_jobs(place)) for place in places if (place / schema.SWEEP).is_file()})
    groups: dict[str, Configuration] = {}
    for folder in dict.fromkeys(folder for place in places for folder in run_folders(place)):
        said = reading.status(folder)
        if said != "done" or not (folder / schema.SUMMARY).is_file():
            found.unfinished[folder] = {"done": f"without {schema.SUMMARY}", "unknown": _UNKNOWN}.get(said, said)
            continue
        cfg = _configuration(folder)
        one = groups.setdefault(json.dumps(settings(cfg), sort_keys=True, default=str), Configuration(cfg))
        if cfg["seed"] in one.summaries:
            found.doubles.append(folder)
            continue
        one.folders.append(folder)
        one.summaries[cfg["seed"]] = reading.summary(folder)
    for sweep, jobs in found.sweeps.items():
        begun = [name for name in jobs if (sweep / name / schema.CONFIG).is_file()]
        found.unfinished |= {sweep / name: _NOT_BEGUN for name in jobs if name not in begun}
    found.configurations = list(groups.values())
    if not found.configurations:
        lines = found.left_out()
        more = f"; and {len(lines) - _TOLD} more" if len(lines) > _TOLD else ""
        raise ConfigError(f"nothing to compare yet: {'; '.join(lines[:_TOLD])}{more}")
    return found


def run_folders(place: Path) -> list[Path]:
    """Return the folders of all runs at or below ``place``: a sweep's in the order of its jobs, others by name.

    A run's reference is part of the run. A sweep of which no job has begun has none.

    Raises
    ------
    ConfigError
        If there is none, and the place is no sweep's folder.
    """
    if not place.is_dir():
        raise ConfigError(
            f"{place}: {'no folder' if place.exists() else 'not there'}; name a run's folder or a sweep's"
        )
    order = _jobs(place)
    found = sorted(_runs_below(place), key=lambda path: (order.get(path.name, len(order)), path))
    if not found and not order:
        raise ConfigError(f"{place}: holds no run; name a run's folder, with a {schema.CONFIG}, or one with runs in it")
    return found


def _jobs(place: Path) -> dict[str, int]:
    """Return name -> place in the list of a sweep's jobs; empty if this is no sweep's folder."""
    index = place / schema.SWEEP
    known = reading.mapping(index)
    if known is None:
        return {}
    try:
        return {str(job["name"]): i for i, job in enumerate(known["jobs"])}
    except (KeyError, TypeError) as error:
        raise ConfigError(f"{index}: not the index of a sweep; remove it, and its runs are compared by name") from error


def _configuration(folder: Path) -> dict[str, Any]:
    """Return a run's configuration; ConfigError if it is damaged, or none of a run."""
    path = folder / schema.CONFIG
    found = reading.required(path)
    if not isinstance(found.get("seed"), int):
        raise reading.Damaged(path, "has no seed", f"leave {folder} out")
    return found


def _runs_below(place: Path) -> Iterator[Path]:
    if (place / schema.CONFIG).is_file():
        yield place
        return
    if any((place / name).is_file() for name in (schema.STATUS, f"{schema.METRICS}.jsonl")):
        # what lies in it is part of it
        raise reading.Damaged(place / schema.CONFIG, "is missing")
    for folder in place.iterdir():
        if folder.is_dir() and not folder.is_symlink():
            yield from _runs_below(folder)
