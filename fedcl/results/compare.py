"""Several runs side by side: one row a configuration, mean and interval over its seeds, a paired test over shared ones.

Only small files are read (``config.yaml``, ``summary.json``, ``STATUS``), so that a hundred runs are compared at once.
"""

from __future__ import annotations

import difflib
import json
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from fedcl.results import schema
from fedcl.results.configurations import names, settings, stream_differences
from fedcl.results.intervals import half_width
from fedcl.results.paired import PairedTest, paired_test
from fedcl.rules import ConfigError

DEFAULT_METRICS = ("accuracy/average", "accuracy/average_incremental", "forgetting/chaudhry", "personal/accuracy_mean")


@dataclass(frozen=True)
class Cell:
    """One metric of one configuration: mean, and half the width of the 95 % t interval where two values or more are.

    ``test`` compares it with the baseline over the seeds that both have; None in the baseline's own row.
    """

    values: dict[int, float]
    test: PairedTest | None

    @property
    def mean(self) -> float | None:
        """Mean over the seeds; None where no run has the metric."""
        return statistics.fmean(self.values.values()) if self.values else None

    @property
    def half_width(self) -> float | None:
        """Half the width of the interval; None with fewer than two values."""
        return half_width(list(self.values.values())) if len(self.values) > 1 else None


@dataclass(frozen=True)
class Row:
    """One configuration: the settings that tell it from the others, its seeds, and a cell for each metric."""

    name: str
    seeds: tuple[int, ...]
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class Comparison:
    """The table: ``rows`` in the order of the runs, ``baseline`` the number of the row that all are tested against.

    ``left_out`` has a line for each run that is not in it, and why; ``streams`` one for each difference of streams that
    was let pass.
    """

    metrics: tuple[str, ...]
    rows: tuple[Row, ...]
    baseline: int
    left_out: tuple[str, ...]
    streams: tuple[str, ...]


@dataclass
class _Configuration:
    cfg: dict[str, Any]
    folders: list[Path] = field(default_factory=list)
    summaries: dict[int, dict[str, Any]] = field(default_factory=dict)


def compare(
    places: Sequence[Path], *, metrics: Sequence[str] = (), baseline: str | None = None, force: bool = False
) -> Comparison:
    """Compare runs.

    Parameters
    ----------
    places
        Folders of runs, or folders with runs somewhere below them, as a sweep leaves one.
    metrics
        Keys of ``summary.json``; those of ``DEFAULT_METRICS`` that some run has where none is given.
    baseline
        A run's folder, or settings by which a row is known (``learner=er``, several apart by spaces); None: first row.
    force
        Compare runs of different streams too.

    Raises
    ------
    ConfigError
        If a folder holds no run, none is done, their streams differ, or metric or baseline are unknown.
    """
    configurations, left_out = _gather(places)
    if not configurations:
        raise ConfigError(f"no run here is done: {'; '.join(left_out)}")
    streams = _streams(configurations)
    if streams and not force:
        raise ConfigError(f"{streams[0]}: other streams are not to be compared; --force does it all the same")
    labels = _labels(configurations)
    first = _baseline(baseline, configurations, labels)
    keys = _metrics(metrics, configurations)
    base = configurations[first].summaries
    rows = tuple(
        Row(label, tuple(sorted(one.summaries)), tuple(_cell(key, one.summaries, base, i == first) for key in keys))
        for i, (label, one) in enumerate(zip(labels, configurations, strict=True))
    )
    return Comparison(keys, rows, first, tuple(left_out), tuple(streams))


def run_folders(place: Path) -> list[Path]:
    """Return the folders of all runs at or below ``place``: a sweep's in the order of its jobs, others by name.

    A run's reference is part of the run.

    Raises
    ------
    ConfigError
        If there is none.
    """
    order = _jobs(place)
    found = sorted(_runs_below(place), key=lambda path: (order.get(path.name, len(order)), path))
    if not found:
        raise ConfigError(f"{place}: holds no run; a run's folder has a {schema.CONFIG}")
    return found


def _jobs(place: Path) -> dict[str, int]:
    """Return name -> place in the list of a sweep's jobs; empty if this is no sweep's folder."""
    index = place / schema.SWEEP
    jobs = json.loads(index.read_text(encoding="utf-8"))["jobs"] if index.is_file() else []
    return {job["name"]: i for i, job in enumerate(jobs)}


def _runs_below(place: Path) -> Iterator[Path]:
    if (place / schema.CONFIG).is_file():
        yield place
        return
    for folder in place.iterdir() if place.is_dir() else ():
        if folder.is_dir() and not folder.is_symlink():
            yield from _runs_below(folder)


def _gather(places: Sequence[Path]) -> tuple[list[_Configuration], list[str]]:
    """Return the runs that are done by configuration, in the order of their folders, and why others are left out."""
    groups: dict[str, _Configuration] = {}
    left_out = []
    for folder in dict.fromkeys(folder for place in places for folder in run_folders(place)):
        status = folder / schema.STATUS
        said = status.read_text().strip() if status.is_file() else "unknown"
        if said != "done" or not (folder / schema.SUMMARY).is_file():
            left_out.append(f"{folder}: not done ({said})")
            continue
        cfg = yaml.safe_load((folder / schema.CONFIG).read_text(encoding="utf-8"))
        one = groups.setdefault(json.dumps(settings(cfg), sort_keys=True, default=str), _Configuration(cfg))
        if cfg["seed"] in one.summaries:
            left_out.append(f"{folder}: the same settings and seed as another run")
            continue
        one.folders.append(folder)
        one.summaries[cfg["seed"]] = json.loads((folder / schema.SUMMARY).read_text(encoding="utf-8"))
    for place in places:
        left_out += [f"{place / job}: not begun" for job in _jobs(place) if not (place / job / schema.CONFIG).is_file()]
    return list(groups.values()), left_out


def _streams(configurations: Sequence[_Configuration]) -> list[str]:
    first = configurations[0]
    return [
        f"{other.folders[0]} against {first.folders[0]}: {'; '.join(differences)}"
        for other in configurations[1:]
        if (differences := stream_differences(first.cfg, other.cfg))
    ]


def _labels(configurations: Sequence[_Configuration]) -> list[str]:
    words = names([one.cfg for one in configurations])
    labels = [
        " ".join(told) or str(one.cfg.get("name", "run")) for told, one in zip(words, configurations, strict=True)
    ]
    return [
        label if labels.count(label) == 1 else f"{label} ({one.folders[0].name})"
        for label, one in zip(labels, configurations, strict=True)
    ]


def _baseline(asked: str | None, configurations: Sequence[_Configuration], labels: Sequence[str]) -> int:
    if asked is None:
        return 0
    folder = Path(asked).resolve()
    for i, one in enumerate(configurations):
        if any(folder == known.resolve() for known in one.folders):
            return i
    fitting = [i for i, label in enumerate(labels) if set(asked.split()) <= set(label.split())]
    if len(fitting) != 1:
        raise ConfigError(f"--baseline {asked}: fits {len(fitting)} rows, must be one of: {'; '.join(labels)}")
    return fitting[0]


def _metrics(asked: Sequence[str], configurations: Sequence[_Configuration]) -> tuple[str, ...]:
    known = {
        key: None
        for one in configurations
        for summary in one.summaries.values()
        for key, value in summary.items()
        if isinstance(value, int | float)
    }
    for key in asked:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=3)
            hint = f"; did you mean {' or '.join(near)}?" if near else f"; there are: {', '.join(sorted(known))}"
            raise ConfigError(f"--metric {key}: no run has it{hint}")
    return tuple(dict.fromkeys(asked)) or tuple(key for key in DEFAULT_METRICS if key in known)


def _cell(key: str, own: dict[int, dict[str, Any]], base: dict[int, dict[str, Any]], is_base: bool) -> Cell:
    values, others = _by_seed(key, own), _by_seed(key, base)
    shared = [seed for seed in values if seed in others]
    test = None if is_base else paired_test([values[seed] for seed in shared], [others[seed] for seed in shared])
    return Cell(values, test)


def _by_seed(key: str, summaries: dict[int, dict[str, Any]]) -> dict[int, float]:
    return {
        seed: float(summaries[seed][key])
        for seed in sorted(summaries)
        if isinstance(summaries[seed].get(key), int | float)
    }
