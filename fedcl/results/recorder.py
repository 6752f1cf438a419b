"""What a run writes down: tables line by line while it runs, Parquet when it is done, small files beside them."""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

from fedcl.base.files import write_atomic
from fedcl.config.value_rules import ConfigError
from fedcl.results import reading, schema, sums
from fedcl.results.environment import create_run_dir, environment
from fedcl.results.reading import Damaged

__all__ = ["Recorder", "create_run_dir", "environment", "to_parquet", "write_atomic", "write_launch", "write_summary"]

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
    digests
        What ``digests`` returned then: table -> SHA-256 of those bytes; none in a checkpoint of an older version.

    Raises
    ------
    ConfigError
        The folder is missing, a new run finds a table that is already there, or a table is not what it was at the
        checkpoint; nothing has been changed then.
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
        self.followers: list[Callable[[Mapping[str, Any]], None]] = []  # each is told every row of the metrics
        self._files: dict[str, BinaryIO] = {table: path.open("ab") for table, path in paths.items()}

    def __enter__(self) -> Self:
        """Return itself, open."""
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close; after an exception without the Parquet files, since the run is not done.

        The hashes of a run that was told to stop are taken: its tables stay as they are until it is resumed.
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
        write_summary(self.run_dir, summary)

    def finalize(self) -> None:
        """Write down the hash of everything that has been measured: it is to stay as it is."""
        sums.finalize(self.run_dir)

    def _write(self, table: str, record: Mapping[str, Any]) -> None:
        self._line(table, _ENCODE(_plain(record)) + "\n")

    def _line(self, table: str, line: str) -> None:
        data = line.encode()
        self._digests[table].update(data)
        self._files[table].write(data)

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


def write_summary(folder: Path, summary: Mapping[str, float | str | None]) -> None:
    """Write ``summary.json`` as :meth:`Recorder.write_summary` does; ValueError for an unknown key."""
    unknown = sorted(key for key in summary if not schema.is_summary_key(key))
    if unknown:
        raise ValueError(f"summary keys {', '.join(unknown)}: not in fedcl.results.schema.SUMMARY_KEYS")
    keys = [key for key in schema.SUMMARY_KEYS if key in summary]
    keys += sorted(key for key in summary if key not in schema.SUMMARY_KEYS)
    text = json.dumps(_plain({key: summary[key] for key in keys}), indent=2, allow_nan=False)
    sums.replace(folder / schema.SUMMARY, text + "\n")


def write_launch(folder: Path, config: str, overrides: Sequence[str], env: Mapping[str, Any]) -> None:
    """Write what a run is: ``overrides.yaml``, ``env.json``, their hashes and, last, ``config.yaml``.

    A folder with a ``config.yaml`` has them all: where a run died before it, it never began.

    Parameters
    ----------
    folder
        The run's folder.
    config
        The resolved configuration as YAML text.
    overrides
        What the user changed, as ``key=value``.
    env
        Where and with what the run runs (:func:`fedcl.results.environment.environment`), and how it was asked for.
    """
    # a JSON string is a YAML string, so writing needs no YAML library on a device
    listed = "".join(f"- {json.dumps(override, ensure_ascii=False)}\n" for override in overrides) or "[]\n"
    told = json.dumps(_plain(env), indent=2, allow_nan=False, ensure_ascii=False) + "\n"
    texts = {schema.OVERRIDES: listed, schema.ENV: told, schema.CONFIG: config}
    write_atomic(folder / schema.OVERRIDES, listed)
    write_atomic(folder / schema.ENV, told)
    sums.write(folder, sums.of_texts(texts))
    write_atomic(folder / schema.CONFIG, config)


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
            raise Damaged(path, f"has {len(data)} bytes, the checkpoint expects {offset}: the table was cut", remedy)
        kept[table] = hashlib.sha256(memoryview(data)[:offset])
        if kept[table].hexdigest() != digests.get(table, kept[table].hexdigest()) or data[offset - 1 : offset] not in (
            b"\n",
            b"",
        ):
            raise Damaged(path, f"its first {offset} bytes are not those of the checkpoint: it was changed", remedy)
    return kept


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
