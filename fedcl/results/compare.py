"""Several runs side by side: one row a configuration, mean and interval over seeds, a paired test over shared ones."""

from __future__ import annotations

import difflib
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedcl.config.value_rules import ConfigError
from fedcl.results.configurations import names, stream_differences
from fedcl.results.gathering import Configuration, Gathered, gather, run_folders
from fedcl.results.intervals import half_width
from fedcl.results.paired import PairedTest, paired_test

__all__ = ["DEFAULT_METRICS", "Cell", "Comparison", "Row", "compare", "run_folders"]

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

    ``left_out`` has a line for each sweep or run that is not wholly in it, and why; ``streams`` one for each difference
    of streams that was let pass.
    """

    metrics: tuple[str, ...]
    rows: tuple[Row, ...]
    baseline: int
    left_out: tuple[str, ...]
    streams: tuple[str, ...]


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
    found = gather(places)
    configurations = found.configurations
    streams = _streams(configurations)
    if streams and not force:
        raise ConfigError(
            f"{streams[0]}: runs with different streams cannot be compared; leave one out, or use --force"
        )
    labels = _labels(configurations)
    first = _baseline(baseline, found, labels)
    keys = _metrics(metrics, configurations)
    base = configurations[first].summaries
    rows = tuple(
        Row(label, tuple(sorted(one.summaries)), tuple(_cell(key, one.summaries, base, i == first) for key in keys))
        for i, (label, one) in enumerate(zip(labels, configurations, strict=True))
    )
    return Comparison(keys, rows, first, tuple(found.left_out()), tuple(streams))


def _streams(configurations: Sequence[Configuration]) -> list[str]:
    first = configurations[0]
    return [
        f"{other.folders[0]} against {first.folders[0]}: {'; '.join(differences)}"
        for other in configurations[1:]
        if (differences := stream_differences(first.cfg, other.cfg))
    ]


def _labels(configurations: Sequence[Configuration]) -> list[str]:
    words = names([one.cfg for one in configurations])
    labels = [
        " ".join(told) or str(one.cfg.get("name", "run")) for told, one in zip(words, configurations, strict=True)
    ]
    return [
        label if labels.count(label) == 1 else f"{label} ({one.folders[0].name})"
        for label, one in zip(labels, configurations, strict=True)
    ]


def _baseline(asked: str | None, found: Gathered, labels: Sequence[str]) -> int:
    if asked is None:
        return 0
    folder = Path(asked).resolve()
    for i, one in enumerate(found.configurations):
        if any(folder == known.resolve() for known in one.folders):
            return i
    for known in found.unfinished:
        if folder == known.resolve():
            raise ConfigError(f"--baseline {asked}: {found.advice(known)}")
    if folder.is_dir():
        raise ConfigError(f"--baseline {asked}: not among the compared runs; add it to them")
    fitting = [i for i, label in enumerate(labels) if set(asked.split()) <= set(label.split())]
    if len(fitting) == 1:
        return fitting[0]
    fits = f"fits {len(fitting)} rows, name more of one" if fitting else "fits no row"
    left = f"; runs that are not done have none: {len(found.unfinished)}" if found.unfinished else ""
    raise ConfigError(f"--baseline {asked}: {fits}; the rows: {', '.join(map(repr, labels))}{left}")


def _metrics(asked: Sequence[str], configurations: Sequence[Configuration]) -> tuple[str, ...]:
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
