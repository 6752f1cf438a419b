"""Reads the files of a run's folder, and checks their hashes and their shape.

A file that cannot be used raises an error that names it and says what to do.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fedcl.config.value_rules import ConfigError
from fedcl.results import schema, sums

STATUSES = ("running", "done", "failed", "interrupted")
_HALF = re.compile(r"\\u[dD][89a-fA-F]")
_AGAIN = "restore it from a copy of the folder, or run the experiment again in another one"
_MADE = "fedcl resume {folder} writes it again"
_REMEDIES = {
    schema.SUMMARY: _MADE,
    f"{schema.METRICS}.parquet": _MADE,
    f"{schema.TIMINGS}.parquet": _MADE,
    schema.STATUS: "remove it; fedcl resume {folder} then continues from the last checkpoint",
    schema.SWEEP: "restore it from a copy, or choose another sweep_dir",
}


class Damaged(ConfigError):
    """A file of a run's folder that cannot be used; the message names it and says what to do."""

    def __init__(self, path: Path, why: str, remedy: str | None = None) -> None:
        if remedy is None and path.parent.name == schema.REFERENCE:
            remedy = f"remove {path.parent}; fedcl resume {path.parent.parent} runs the reference again"
        if remedy is None:
            remedy = _REMEDIES.get(path.name, _AGAIN).format(folder=path.parent)
        super().__init__(f"{path}: {' '.join(why.split())[:300]}; {remedy}")


def content(path: Path, *, checked: bool = True) -> bytes | None:
    """Return the bytes of a file, or None if there is none and none is expected.

    Raises
    ------
    Damaged
        If it cannot be read, or does not match its hash in the run's ``SHA256SUMS`` (unless ``checked`` is false).
    """
    known = sums.read(path.parent).get(path.name) if checked else None
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        if known is None:
            return None
        raise Damaged(path, "is missing") from error
    except OSError as error:
        raise Damaged(path, f"cannot be read: {error.strerror}") from error
    if known is not None and hashlib.sha256(data).hexdigest() not in known:
        raise Damaged(path, f"damaged: it does not match its hash in {schema.SUMS}")
    return data


def text(path: Path, *, checked: bool = True) -> str | None:
    """Return the text of a file, or None if there is none; Damaged as :func:`content`, or if it is not UTF-8."""
    data = content(path, checked=checked)
    return None if data is None else _decoded(path, data)


def mapping(path: Path, *, checked: bool = True) -> dict[str, Any] | None:
    """Return the mapping in a JSON or YAML file, or None if there is none; Damaged if it holds anything else."""
    found = text(path, checked=checked)
    if found is None:
        return None
    value = _parsed(path, json.loads if path.suffix == ".json" else _yaml, found)
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise Damaged(path, "must be a mapping")
    return value


def required(path: Path, *, checked: bool = True) -> dict[str, Any]:
    """Return what :func:`mapping` does; Damaged also if the file is missing."""
    found = mapping(path, checked=checked)
    if found is None:
        raise Damaged(path, "is missing")
    return found


def summary(folder: Path) -> dict[str, Any]:
    """Return a run's summary, empty if there is none yet; Damaged if it is anything but names with numbers."""
    path = folder / schema.SUMMARY
    found = mapping(path) or {}
    if not all(isinstance(value, int | float | str | None) for value in found.values()):
        raise Damaged(path, "must map names to numbers")
    return found


def environment(folder: Path, *, checked: bool = True) -> dict[str, Any]:
    """Return a run's ``env.json``, empty if there is none; Damaged if its parts have the wrong types."""
    path = folder / schema.ENV
    found = mapping(path, checked=checked) or {}
    launch = found.get("launch", {})
    nested = [found.get(name) or {} for name in ("packages", "threads", "git", "launch")]
    lists = [launch.get(name, []) for name in ("overrides", "config_dirs", "plugin_paths")] if nested[3] else []
    wrong = not all(isinstance(value, Mapping) for value in nested) or not all(_texts(value) for value in lists)
    if wrong:
        raise Damaged(path, "must have the fields that a run writes")
    return found


def overrides(folder: Path) -> list[str]:
    """Return what the user changed, as ``key=value``; each is a JSON string behind a dash."""
    path = folder / schema.OVERRIDES
    lines = [line for line in (text(path) or "").splitlines() if line.strip() not in ("", "[]")]
    found = [_parsed(path, json.loads, line.removeprefix("- ")) for line in lines]
    if not _texts(found):
        raise Damaged(path, "must be a list of strings")
    return found


def lines(path: Path) -> list[dict[str, Any]]:
    """Return the records of a table of JSON lines; a last line without a line end is still being written."""
    data = content(path)
    if data is None:
        return []
    found = [_parsed(path, json.loads, _decoded(path, line)) for line in data.split(b"\n")[:-1]]
    for number, record in enumerate(found, start=1):
        if not isinstance(record, dict):
            raise Damaged(path, f"line {number} must be a JSON object")
    return found


def events(folder: Path) -> list[dict[str, Any]]:
    """Return a run's events; Damaged if one has no kind or time."""
    path = folder / f"{schema.EVENTS}.jsonl"
    found = lines(path)
    for number, record in enumerate(found, start=1):
        kinds = (record.get("round"), int), (record.get("virtual_time"), int | float), (record.get("kind"), str)
        if not all(isinstance(value, kind) for value, kind in kinds):
            raise Damaged(path, f"line {number} is not an event")
    return found


def status(folder: Path) -> str:
    """Return ``running``, ``done``, ``failed`` or ``interrupted``; ``unknown`` if it cannot be read."""
    data = content(folder / schema.STATUS)
    said = "" if data is None else data.decode("utf-8", errors="replace").strip()
    return said if said in STATUSES else "unknown"


def _decoded(path: Path, data: bytes) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise Damaged(path, f"damaged, it cannot be read: {error}") from error


def _parsed(path: Path, parse: Callable[[str], Any], found: str) -> Any:
    try:
        value = parse(found)
        if _HALF.search(found):  # half a surrogate pair is not a character: it can neither be shown nor written
            json.dumps(value, ensure_ascii=False, default=str).encode()
    except (ValueError, RecursionError) as error:
        raise Damaged(path, f"damaged, it cannot be read: {error}") from error
    return value


def _yaml(found: str) -> Any:
    import yaml  # a device writes its results without it

    try:
        return yaml.safe_load(found)
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error


def _texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(entry, str) for entry in value)
