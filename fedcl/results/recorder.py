"""The tables of a run: written line by line while it runs, as Parquet at the end."""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

from fedcl.base.files import write_atomic
from fedcl.config.value_rules import ConfigError
from fedcl.results import reading, schema, sums
from fedcl.results.reading import Damaged
from fedcl.results.writing import plain, to_parquet, write_summary

_METRIC_COLUMNS = tuple(schema.METRIC_COLUMNS)
_ENCODE = json.JSONEncoder(allow_nan=False, separators=(",", ":"), ensure_ascii=False).encode  # made once, not a line
_METRIC_LINE = "{" + ",".join(f'"{column}":%s' for column in _METRIC_COLUMNS) + "}\n"
_quoted = functools.lru_cache(maxsize=1 << 15)(_ENCODE)  # the names of clients and metrics come again and again


class Recorder:
    """Writes the tables and small files of one run's folder.

    Lines are buffered; only ``flush`` makes them durable. Whatever a killed process wrote after its last checkpoint is
    cut off on resume, at the byte offsets that the checkpoint holds.

    Parameters
    ----------
    run_dir
        Folder of the run; must exist (``create_run_dir``).
    resume_offsets
        None for a new run. Otherwise what ``flush`` returned when the checkpoint was written: table -> bytes to keep.
    digests
        What ``digests`` returned then: table -> SHA-256 of those bytes. None to check nothing.

    Raises
    ------
    ConfigError
        If the folder is missing, a new run finds a table that is already there, or a table differs from what it was at
        the checkpoint. Nothing has been changed then.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        resume_offsets: Mapping[str, int] | None = None,
        digests: Mapping[str, str] | None = None,
    ) -> None:
        self.run_dir = Path(run_dir)
        if not self.run_dir.is_dir():
            raise ConfigError(f"run_dir={self.run_dir}: must be an existing folder")
        _refuse_folders(self.run_dir)
        paths = {table: self.run_dir / f"{table}.jsonl" for table in schema.TABLES}
        self._digests = {table: hashlib.sha256() for table in paths}
        if resume_offsets is None:
            _refuse_existing(paths)
        else:
            self._digests = _checked(paths, resume_offsets, digests or {})
        sums.begin(self.run_dir)
        for table, path in paths.items():
            if resume_offsets is not None and path.exists():
                os.truncate(path, resume_offsets[table])
        for table in (schema.METRICS, schema.TIMINGS):  # made from lines that may be cut off now
            (self.run_dir / f"{table}.parquet").unlink(missing_ok=True)
        self.followers: list[Callable[[Mapping[str, Any]], None]] = []  # each receives every row of the metrics
        self._files: dict[str, BinaryIO] = {table: path.open("ab") for table, path in paths.items()}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close; after an exception without the Parquet files, since the run is not done.

        An interrupted run gets its hashes: its tables do not change until it is resumed.
        """
        self.close(finished=exc_type is None)
        if exc_type is not None and issubclass(exc_type, (KeyboardInterrupt, SystemExit)):
            self.finalize()

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

    def event(self, kind: str, *, round: int, virtual_time: float, **fields: Any) -> None:
        """Record that something happened: a fault, a rejected reply, an unlearning request, a task boundary.

        Parameters
        ----------
        kind
            What happened, one word that the report counts by.
        round, virtual_time
            When: server round (-1 before training) and virtual clock in seconds.
        **fields
            Values that JSON can hold; numpy scalars and arrays are converted, numbers that are not finite become null.

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

    def digests(self) -> dict[str, str]:
        """Return table -> SHA-256 of every line so far, for the checkpoint."""
        return {table: digest.hexdigest() for table, digest in self._digests.items()}

    def close(self, *, finished: bool = True) -> None:
        """Flush, close, and write ``metrics.parquet`` and ``timings.parquet``; the lines are kept. Twice is harmless.

        The bytes of a Parquet file depend on its lines and on the version of pyarrow alone.

        Parameters
        ----------
        finished
            False for a run that was interrupted or failed: it may be resumed, so it gets no Parquet files.
        """
        if all(file.closed for file in self._files.values()):
            return
        self.flush()
        for file in self._files.values():
            file.close()
        if finished:
            to_parquet(self.run_dir / "metrics.jsonl", self.run_dir / "metrics.parquet", schema.METRIC_COLUMNS)
            to_parquet(self.run_dir / "timings.jsonl", self.run_dir / "timings.parquet", schema.TIMING_COLUMNS)

    def status(self, text: str) -> None:
        """Replace ``STATUS`` (``running``, ``done``, ``failed``, ``interrupted``), never leaving half a file."""
        write_atomic(self.run_dir / schema.STATUS, text.rstrip("\n") + "\n")

    def write_summary(self, summary: Mapping[str, float | str | None]) -> None:
        """Write ``summary.json`` (:func:`fedcl.results.writing.write_summary`)."""
        write_summary(self.run_dir, summary)

    def finalize(self) -> None:
        """Record the hashes of the results, which do not change any more."""
        sums.finalize(self.run_dir)

    def _write(self, table: str, record: Mapping[str, Any]) -> None:
        self._line(table, _ENCODE(plain(record)) + "\n")

    def _line(self, table: str, line: str) -> None:
        data = line.encode()
        self._digests[table].update(data)
        self._files[table].write(data)


def _text(value: str | float | None) -> str:
    """Return a JSON value: what the encoder makes of it, without setting one up for each line."""
    if isinstance(value, str):
        return _quoted(value)
    return "null" if value is None else repr(value)


def _refuse_existing(paths: Mapping[str, Path]) -> None:
    for path in paths.values():
        if path.exists() and path.stat().st_size:
            raise ConfigError(f"run_dir={path.parent}: already holds {path.name}; resume it or choose another folder")


def _refuse_folders(run_dir: Path) -> None:
    """Refuse a folder in the place of a file that is to be written, before anything is changed."""
    for name in (schema.STATUS, schema.SUMS, *schema.WRITTEN):
        if (run_dir / name).is_dir():
            raise Damaged(run_dir / name, "is a folder", "remove it")


def _checked(
    paths: Mapping[str, Path], offsets: Mapping[str, int], digests: Mapping[str, str]
) -> dict[str, hashlib._Hash]:
    """Return the hash of each table up to a checkpoint's bytes; Damaged if they are not what they were then."""
    folder = next(iter(paths.values())).parent
    remedy = f"restore it, or remove {folder / 'checkpoints'}: fedcl resume then starts the run again"
    if set(offsets) != set(paths):
        raise ConfigError(f"resume_offsets={sorted(offsets)}: must name exactly {sorted(paths)}")
    kept = {}
    for table, path in paths.items():
        data, offset = reading.content(path, checked=False) or b"", offsets[table]
        if not 0 <= offset <= len(data):
            raise Damaged(
                path, f"has {len(data)} bytes, the checkpoint expects {offset}: the table was truncated", remedy
            )
        kept[table] = hashlib.sha256(memoryview(data)[:offset])
        if kept[table].hexdigest() != digests.get(table, kept[table].hexdigest()) or data[offset - 1 : offset] not in (
            b"\n",
            b"",
        ):
            raise Damaged(path, f"its first {offset} bytes are not those of the checkpoint: it was changed", remedy)
    return kept
