"""What a run writes down: tables line by line while it runs, Parquet when it is done, small files beside them."""

from __future__ import annotations

import functools
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

from fedcl.files import write_atomic
from fedcl.results import schema
from fedcl.results.environment import create_run_dir, environment

__all__ = ["Recorder", "create_run_dir", "environment", "to_parquet", "write_atomic"]

_METRIC_COLUMNS = tuple(schema.METRIC_COLUMNS)
_ENCODE = json.JSONEncoder(allow_nan=False, separators=(",", ":"), ensure_ascii=False).encode  # made once, not a line
_METRIC_LINE = "{" + ",".join(f'"{column}":%s' for column in _METRIC_COLUMNS) + "}\n"
_quoted = functools.lru_cache(maxsize=1 << 15)(_ENCODE)  # the names of clients and metrics come again and again


class Recorder:
    """Writes the tables and small files of one run's folder.

    Lines are buffered; only ``flush`` makes them durable. A process that dies between two flushes leaves a longer or
    torn table behind, which the byte offsets of the last checkpoint cut off again.

    Parameters
    ----------
    run_dir
        Folder of the run; must exist (``create_run_dir``).
    resume_offsets
        None for a new run. Otherwise what ``flush`` returned when the checkpoint was written: table -> bytes to keep.

    Raises
    ------
    ValueError
        The folder is missing, a new run finds a table that is already there, or a table does not reach its offset.
    """

    def __init__(self, run_dir: Path, *, resume_offsets: Mapping[str, int] | None = None) -> None:
        self.run_dir = Path(run_dir)
        if not self.run_dir.is_dir():
            raise ValueError(f"run_dir={self.run_dir}: must be an existing folder")
        paths = {table: self.run_dir / f"{table}.jsonl" for table in schema.TABLES}
        if resume_offsets is None:
            _refuse_existing(paths)
        else:
            _truncate(paths, resume_offsets)
        for table in (schema.METRICS, schema.TIMINGS):  # made from lines that may be cut off now
            (self.run_dir / f"{table}.parquet").unlink(missing_ok=True)
        self.followers: list[Callable[[Mapping[str, Any]], None]] = []  # each is told every row of the metrics
        self._files: dict[str, BinaryIO] = {table: path.open("ab") for table, path in paths.items()}

    def __enter__(self) -> Self:
        """Return itself, open."""
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close; after an exception without the Parquet files, since the run is not done."""
        self.close(finished=exc_type is None)

    def row(
        self,
        *,
        round: int,
        phase: str,
        name: str,
        value: float,
        virtual_time: float,
        client: str = "",
        task: int = -1,
        after: int = -1,
        step: int = -1,
    ) -> None:
        """Record one value; see ``schema.Row`` for the fields. A value that is not finite is stored as missing.

        Raises
        ------
        ValueError
            ``phase`` is none of ``schema.PHASES``, or ``virtual_time`` is not finite.
        """
        if phase not in schema.PHASES:
            raise ValueError(f"phase={phase!r}: must be one of {', '.join(schema.PHASES)}")
        if not math.isfinite(virtual_time):
            raise ValueError(f"virtual_time={virtual_time}: must be finite")
        number = float(value)
        when = (int(round), float(virtual_time), str(client), int(task), int(after), int(step))
        fields = (*when, phase, str(name), number if math.isfinite(number) else None)
        self._line(schema.METRICS, _METRIC_LINE % tuple(map(_text, fields)))
        if self.followers:
            record = dict(zip(_METRIC_COLUMNS, fields, strict=True))
            for follow in self.followers:
                follow(record)

    def rows(self, rows: Iterable[schema.Row]) -> None:
        """Record several values in their order."""
        for row in rows:
            self.row(**row._asdict())

    def event(self, kind: str, *, round: int, virtual_time: float, **fields: Any) -> None:
        """Record that something happened: a fault, a rejected reply, an unlearning request, a task boundary.

        Parameters
        ----------
        kind
            What happened, one word that the report counts by.
        round, virtual_time
            When: server round (-1 before training) and virtual clock in seconds.
        **fields
            Whatever JSON can say; numpy scalars and arrays are converted, numbers that are not finite become null.

        Raises
        ------
        TypeError
            A field cannot be written as JSON.
        ValueError
            ``virtual_time`` is not finite.
        """
        if not math.isfinite(virtual_time):
            raise ValueError(f"virtual_time={virtual_time}: must be finite")
        record = {"round": int(round), "virtual_time": float(virtual_time), "kind": kind, **fields}
        self._write(schema.EVENTS, record)

    def timing(self, round: int, name: str, seconds: float) -> None:
        """Record measured wall-clock seconds, which stay out of the metrics so that equal runs have equal metrics."""
        self._write(schema.TIMINGS, {"round": int(round), "name": str(name), "seconds": float(seconds)})

    def flush(self) -> dict[str, int]:
        """Make every line so far durable (fsync) and return table -> length in bytes, for the checkpoint."""
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())
        return {table: file.tell() for table, file in self._files.items()}

    def close(self, *, finished: bool = True) -> None:
        """Flush, close, and write ``metrics.parquet`` and ``timings.parquet``; the lines are kept. Twice is harmless.

        The bytes of a Parquet file depend on its lines and on the version of pyarrow alone.

        Parameters
        ----------
        finished
            False for a run that was interrupted or failed: it may be resumed, so it gets no Parquet files.
        """
        if self._close_tables() and finished:
            to_parquet(self.run_dir / "metrics.jsonl", self.run_dir / "metrics.parquet", schema.METRIC_COLUMNS)
            to_parquet(self.run_dir / "timings.jsonl", self.run_dir / "timings.parquet", schema.TIMING_COLUMNS)

    def status(self, text: str) -> None:
        """Replace ``STATUS`` (``running``, ``done``, ``failed``, ``interrupted``), never leaving half a file."""
        write_atomic(self.run_dir / schema.STATUS, text.rstrip("\n") + "\n")

    def write_summary(self, summary: Mapping[str, float | str | None]) -> None:
        """Write ``summary.json``: flat, keys of the schema in their order, numbers that are not finite as null.

        Raises
        ------
        ValueError
            A key that ``schema.is_summary_key`` does not know: scripts depend on the names.
        """
        unknown = sorted(key for key in summary if not schema.is_summary_key(key))
        if unknown:
            raise ValueError(f"summary keys {', '.join(unknown)}: not in fedcl.results.schema.SUMMARY_KEYS")
        keys = [key for key in schema.SUMMARY_KEYS if key in summary]
        keys += sorted(key for key in summary if key not in schema.SUMMARY_KEYS)
        text = json.dumps(_plain({key: summary[key] for key in keys}), indent=2, allow_nan=False)
        write_atomic(self.run_dir / schema.SUMMARY, text + "\n")

    def write_config(self, config: str, overrides: Sequence[str]) -> None:
        """Write ``config.yaml`` (resolved YAML text) and ``overrides.yaml`` (what the user changed, ``key=value``)."""
        write_atomic(self.run_dir / schema.CONFIG, config)
        # a JSON string is a YAML string, so writing needs no YAML library on a device
        lines = "".join(f"- {json.dumps(override)}\n" for override in overrides)
        write_atomic(self.run_dir / schema.OVERRIDES, lines or "[]\n")

    def write_env(self, env: Mapping[str, Any]) -> None:
        """Write ``env.json``: where and with what the run ran (``fedcl.results.environment.environment``)."""
        write_atomic(self.run_dir / schema.ENV, json.dumps(_plain(env), indent=2, allow_nan=False) + "\n")

    def _write(self, table: str, record: Mapping[str, Any]) -> None:
        self._line(table, _ENCODE(_plain(record)) + "\n")

    def _line(self, table: str, line: str) -> None:
        self._files[table].write(line.encode())

    def _close_tables(self) -> bool:
        if all(file.closed for file in self._files.values()):
            return False
        self.flush()
        for file in self._files.values():
            file.close()
        return True


def _text(value: str | float | None) -> str:
    """Return a JSON value: what the encoder makes of it, without setting one up for each line."""
    if isinstance(value, str):
        return _quoted(value)
    return "null" if value is None else repr(value)


def to_parquet(lines: Path, target: Path, columns: Mapping[str, str]) -> None:
    """Turn a table of JSON lines into Parquet, atomically and with the same bytes for the same lines.

    Parameters
    ----------
    lines
        File with one JSON object a line, each with exactly the keys of ``columns``.
    target
        Parquet file to replace.
    columns
        Column -> ``int64``, ``float64`` or ``str``, in the order of the file; null in a ``float64`` stays null.

    Raises
    ------
    pyarrow.ArrowInvalid
        A line has another key, or a value of another type.
    """
    import pyarrow as pa
    import pyarrow.json
    import pyarrow.parquet

    types = {"int64": pa.int64(), "float64": pa.float64(), "str": pa.string()}
    layout = pa.schema([(name, types[kind]) for name, kind in columns.items()])
    if lines.stat().st_size:
        parse = pyarrow.json.ParseOptions(explicit_schema=layout, unexpected_field_behavior="error")
        # one thread and one chunk: the layout of pages must not depend on the machine
        table = pyarrow.json.read_json(lines, pyarrow.json.ReadOptions(use_threads=False), parse).combine_chunks()
    else:
        table = layout.empty_table()
    temporary = target.with_name(f".{target.name}.tmp")
    pyarrow.parquet.write_table(table, temporary, compression="zstd", row_group_size=1 << 17, version="2.6")
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    temporary.replace(target)


def _refuse_existing(paths: Mapping[str, Path]) -> None:
    for path in paths.values():
        if path.exists() and path.stat().st_size:
            raise ValueError(f"run_dir={path.parent}: already holds {path.name}; resume it or choose another folder")


def _truncate(paths: Mapping[str, Path], offsets: Mapping[str, int]) -> None:
    if set(offsets) != set(paths):
        raise ValueError(f"resume_offsets={sorted(offsets)}: must name exactly {sorted(paths)}")
    for table, path in paths.items():
        size, offset = path.stat().st_size if path.exists() else 0, offsets[table]
        if not 0 <= offset <= size:
            raise ValueError(f"{path}: has {size} bytes, the checkpoint expects at least {offset}; the table was cut")
        if offset and not _ends_line(path, offset):
            raise ValueError(f"{path}: byte {offset} of the checkpoint is not the end of a line; the table was changed")
    for table, path in paths.items():
        if path.exists():
            os.truncate(path, offsets[table])


def _ends_line(path: Path, offset: int) -> bool:
    with path.open("rb") as file:
        file.seek(offset - 1)
        return file.read(1) == b"\n"


def _plain(value: Any) -> Any:
    """Return what JSON can say: scalars and arrays of numpy or torch as numbers and lists, not finite as null."""
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, str | int | None):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    if isinstance(value, Path):
        return str(value)
    return value
