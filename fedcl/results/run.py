"""Reading a run's folder back, finished or not: the way in for reports, figures and notebooks."""

from __future__ import annotations

import functools
import io
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from fedcl.config.value_rules import ConfigError
from fedcl.evaluation.metrics import Kind, forgetting_by_task, summarise
from fedcl.results import reading, schema
from fedcl.results.reading import Damaged


@dataclass(frozen=True)
class Run:
    """A run as its folder tells it; ``fedcl.results.load`` makes one."""

    path: Path
    """Folder of the run."""
    metrics: pd.DataFrame
    """Long form, columns of ``schema.METRIC_COLUMNS``; a missing value is NaN."""
    timings: pd.DataFrame
    """Wall-clock seconds by round and name."""
    events: pd.DataFrame
    """One row an event: ``round``, ``virtual_time``, ``kind`` and the fields of each kind (NaN for the others)."""
    summary: dict[str, Any]
    """``summary.json``; empty while the run goes on."""
    config: dict[str, Any]
    """The resolved configuration, plain dicts and lists."""
    overrides: list[str]
    """What the user changed, as ``key=value``."""
    env: dict[str, Any]
    """Where and with what the run ran."""
    status: str
    """``running``, ``done``, ``failed``, ``interrupted``; ``unknown`` when nothing was written."""
    reference: Run | None
    """The run of ``<path>/reference`` that this one is compared with, if there is one."""

    @property
    def accuracy(self) -> pd.DataFrame:
        """Rows of the global model's test accuracy, in the order they were recorded."""
        table = self.metrics
        return table[(table["phase"] == "test") & (table["name"] == "accuracy") & (table["client"] == "")]

    def accuracy_matrix(self) -> pd.DataFrame:
        """Return the global test accuracy, row = after task, column = on task; see ``accuracy_matrix``."""
        return self._matrix.copy()

    @functools.cached_property
    def _matrix(self) -> pd.DataFrame:
        return accuracy_matrix(self.metrics)

    def baseline(self) -> NDArray[np.float64] | None:
        """Return the accuracy before training on each task, shape (T,); None when it was not measured."""
        before = self.accuracy[self.accuracy["after"] < 0]
        if before.empty:
            return None
        value = before.drop_duplicates("task", keep="last").set_index("task")["value"]
        return value.reindex(range(len(self.accuracy_matrix()))).to_numpy(dtype=np.float64)

    def reached_matrix(self) -> NDArray[np.float64]:
        """Return the accuracy matrix of the tasks reached so far, shape (K, K): all T once the run is done."""
        matrix = self.accuracy_matrix()
        measured = matrix.index[matrix.notna().any(axis=1)]
        reached = int(measured.max()) + 1 if len(measured) else 0
        return matrix.to_numpy(dtype=np.float64)[:reached, :reached]

    def forgetting(self, kind: Kind = "chaudhry") -> pd.Series[float]:
        """Return what was forgotten of each task reached but the last; empty before a second task is reached.

        See ``fedcl.evaluation.metrics.forgetting_by_task``.
        """
        matrix = self.reached_matrix()
        values = forgetting_by_task(matrix, kind) if len(matrix) else np.empty(0)
        return pd.Series(values, index=pd.RangeIndex(len(values), name="task"), name=f"forgetting/{kind}")

    def headline(self) -> dict[str, Any]:
        """Return the summary, or while there is none what the tasks reached so far say; empty without either."""
        matrix = self.reached_matrix()
        if self.summary or not len(matrix):
            return self.summary
        baseline = self.baseline()
        return dict(summarise(matrix, None if baseline is None else baseline[: len(matrix)]))

    def staleness(self) -> pd.Series[int]:
        """Return how many updates counted at each age, in versions of the model; empty where none can be late."""
        ages = self.metrics.loc[(self.metrics["phase"] == "train") & (self.metrics["name"] == "age"), "value"]
        return ages.astype("int64").value_counts().sort_index().rename("updates").rename_axis("age")

    def unheard(self) -> set[str]:
        """Return the clients whose reply was lost or rejected when personal models were tested last."""
        return {client for at, client in self._lost_evaluations if at == self._last_personal}

    @property
    def _last_personal(self) -> int:
        """The last round after which personal models were tested, whether or not anybody answered; -1 for none."""
        tested = self.metrics.loc[(self.metrics["phase"] == "personal") & (self.metrics["client"] != ""), "round"]
        return int(max([*tested, *(at for at, _ in self._lost_evaluations)], default=-1))

    @property
    def _lost_evaluations(self) -> list[tuple[int, str]]:
        """Return (round, client) of the evaluations that no sound reply came to."""
        if "message" not in self.events:
            return []
        lost = self.events[self.events["kind"].isin(("client_failed", "reply_rejected"))]
        lost = lost[lost["message"] == "evaluate"]
        return [(int(at), str(client)) for at, client in zip(lost["round"], lost["client"], strict=True)]

    def by_client(self, phase: str = "personal", name: str = "accuracy") -> dict[str, float]:
        """Return client -> its latest value, the mean over the tasks measured in that round.

        In phase ``personal`` everybody is tested together, so that only the last time counts: a client that has left,
        or whose reply was lost (`unheard`), has no value then, and none from an earlier time stands in for it.

        Parameters
        ----------
        phase
            ``received``, ``trained`` or ``personal``.
        name
            The metric.
        """
        table = self.metrics
        table = table[(table["phase"] == phase) & (table["name"] == name) & (table["client"] != "")]
        if phase == "personal":
            latest = table[(table["round"] == self._last_personal) & ~table["client"].isin(self.unheard())]
        else:
            latest = table[table["round"] == table.groupby("client")["round"].transform("max")]
        return {str(client): float(value) for client, value in latest.groupby("client")["value"].mean().items()}


def load(run_dir: Path | str) -> Run:
    """Read a run's folder: Parquet where the run is finished, else the lines written so far.

    Parameters
    ----------
    run_dir
        Folder of the run.

    Where a Parquet file cannot be used, the lines that it was made from are, with a warning.

    Raises
    ------
    ConfigError
        The folder is missing or holds no run, or a file in it is damaged; it is named, with what to do.
    """
    path = Path(run_dir)
    if not _is_run(path):
        raise ConfigError(f"run_dir={path}: must be a run's folder, but has neither {schema.CONFIG} nor metrics")
    reference = path / schema.REFERENCE
    return Run(
        path=path,
        metrics=_table(path, schema.METRICS, schema.METRIC_COLUMNS),
        timings=_table(path, schema.TIMINGS, schema.TIMING_COLUMNS),
        events=_events(path),
        summary=reading.summary(path),
        config=reading.mapping(path / schema.CONFIG) or {},
        overrides=reading.overrides(path),
        env=reading.environment(path),
        status=reading.status(path),
        reference=load(reference) if _is_run(reference) else None,
    )


def accuracy_matrix(metrics: pd.DataFrame) -> pd.DataFrame:
    """Return the global model's test accuracy at the end of each task, shape (T, T), index ``after``, columns ``task``.

    T counts every task that was evaluated or reached. The last value recorded for (after, task) counts, which in a run
    that still goes on is, for the task under way, the latest one. What was not measured is NaN; without any global test
    accuracy the frame is empty.

    Parameters
    ----------
    metrics
        Table with the columns of ``schema.METRIC_COLUMNS``, in the order of recording.
    """
    of_interest = (metrics["phase"] == "test") & (metrics["name"] == "accuracy") & (metrics["client"] == "")
    rows = metrics[of_interest & (metrics["task"] >= 0)]
    if rows.empty:
        return pd.DataFrame(dtype=np.float64)
    tasks = range(int(max(rows["task"].max(), rows["after"].max())) + 1)
    last = rows.drop_duplicates(["after", "task"], keep="last")
    return last.pivot(index="after", columns="task", values="value").reindex(index=tasks, columns=tasks)


def _is_run(path: Path) -> bool:
    return any((path / name).exists() for name in (schema.CONFIG, "metrics.parquet", "metrics.jsonl"))


def _table(path: Path, table: str, columns: dict[str, str]) -> pd.DataFrame:
    parquet, lines = path / f"{table}.parquet", path / f"{table}.jsonl"
    try:
        data = reading.content(parquet)
        if data is not None:
            return _typed(parquet, lambda: pd.read_parquet(io.BytesIO(data), columns=list(columns)), columns)
    except Damaged as error:
        if not lines.is_file():
            raise
        rows = reading.lines(lines)
        warnings.warn(f"{error}; taking {lines.name}", stacklevel=3)
    else:
        rows = reading.lines(_there(lines))
    return _typed(lines, lambda: pd.DataFrame(rows, columns=list(columns)), columns)


def _there(path: Path) -> Path:
    """Return a file of lines, which is there once a run has begun: its STATUS comes later."""
    if not path.is_file() and (path.parent / schema.STATUS).is_file():
        raise Damaged(path, "is missing")
    return path


def _typed(path: Path, read: Callable[[], pd.DataFrame], columns: dict[str, str]) -> pd.DataFrame:
    try:
        return read().astype(columns)
    except (ValueError, TypeError, KeyError, OSError) as error:  # pyarrow's ArrowInvalid is a ValueError
        raise Damaged(path, f"damaged, it cannot be read: {error}") from error


def _events(path: Path) -> pd.DataFrame:
    _there(path / f"{schema.EVENTS}.jsonl")
    frame = pd.DataFrame(reading.events(path))
    return frame.reindex(columns=[*schema.EVENT_FIELDS, *(c for c in frame.columns if c not in schema.EVENT_FIELDS)])
