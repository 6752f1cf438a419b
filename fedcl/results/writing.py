"""The small files of a run's folder, and a table of JSON lines as Parquet."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedcl.base.files import write_atomic
from fedcl.results import schema, sums


def write_summary(folder: Path, summary: Mapping[str, float | str | None]) -> None:
    """Write ``summary.json``: flat, keys of the schema in their order, numbers that are not finite as null.

    Raises
    ------
    ValueError
        If ``schema.is_summary_key`` does not know a key: scripts depend on the names.
    """
    unknown = sorted(key for key in summary if not schema.is_summary_key(key))
    if unknown:
        raise ValueError(f"summary keys {', '.join(unknown)}: not in fedcl.results.schema.SUMMARY_KEYS")
    keys = [key for key in schema.SUMMARY_KEYS if key in summary]
    keys += sorted(key for key in summary if key not in schema.SUMMARY_KEYS)
    text = json.dumps(plain({key: summary[key] for key in keys}), indent=2, allow_nan=False)
    sums.replace(folder / schema.SUMMARY, text + "\n")


def write_launch(folder: Path, config: str, overrides: Sequence[str], env: Mapping[str, Any]) -> None:
    """Write the files that define a run: ``overrides.yaml``, ``env.json``, their hashes and, last, ``config.yaml``.

    A folder with a ``config.yaml`` has them all. Without it, the run never began.

    Parameters
    ----------
    folder
        The run's folder.
    config
        The resolved configuration as YAML text.
    overrides
        What the user changed, as ``key=value``.
    env
        The machine and its software (:func:`fedcl.results.environment.environment`), and how the run was started.
    """
    # a JSON string is a YAML string, so writing needs no YAML library on a device
    listed = "".join(f"- {json.dumps(override, ensure_ascii=False)}\n" for override in overrides) or "[]\n"
    machine = json.dumps(plain(env), indent=2, allow_nan=False, ensure_ascii=False) + "\n"
    texts = {schema.OVERRIDES: listed, schema.ENV: machine, schema.CONFIG: config}
    write_atomic(folder / schema.OVERRIDES, listed)
    write_atomic(folder / schema.ENV, machine)
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


def plain(value: Any) -> Any:
    """Return a value that JSON can hold: numpy and torch values as numbers and lists, NaN and infinity as None."""
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, str | int | None):
        return value
    if isinstance(value, Mapping):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    if isinstance(value, Path):
        return str(value)
    return value
