"""``SHA256SUMS`` in a run's folder: what each file held when the run wrote it, as ``sha256sum -c`` reads it.

It detects accidents: a flipped bit, an edit, an incomplete copy. From the start it lists the files that define the run,
and its tables and summary once it is done. Until then the checkpoints hold the hashes of the tables.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from fedcl.base.files import write_atomic, write_bytes_atomic
from fedcl.config.value_rules import ConfigError
from fedcl.results import schema

_LINE = re.compile(r"([0-9a-f]{64})  ([A-Za-z0-9._-]+)")
Sums = dict[str, tuple[str, ...]]  # file -> hashes that it may have: two while it is being replaced


def read(folder: Path) -> Sums:
    """Return the hashes of the files in ``folder``; empty if there is no list.

    Raises
    ------
    ConfigError
        If the list is damaged.
    """
    path = folder / schema.SUMS
    try:
        lines = path.read_bytes().decode("ascii").splitlines()
    except FileNotFoundError:
        return {}
    except (OSError, ValueError):
        lines = []
    found: Sums = {}
    for line in lines or [""]:
        match = _LINE.fullmatch(line)
        if match is None:
            raise ConfigError(f"{path}: damaged; restore it, or remove it to skip its checks")
        found[match[2]] = (*found.get(match[2], ()), match[1])
    return found


def write(folder: Path, sums: Mapping[str, Iterable[str]]) -> None:
    """Replace the list."""
    lines = [f"{digest}  {name}\n" for name, digests in sums.items() for digest in dict.fromkeys(digests)]
    write_atomic(folder / schema.SUMS, "".join(lines))


def of_texts(texts: Mapping[str, str]) -> Sums:
    """Return the hashes of texts before they are written."""
    return {name: (hashlib.sha256(text.encode()).hexdigest(),) for name, text in texts.items()}


def begin(folder: Path) -> None:
    """Drop the hashes of what changes during a run: of all but the files that define it."""
    known = read(folder)
    kept = {name: digests for name, digests in known.items() if name in schema.LAUNCH}
    if kept == known:
        return
    if kept:
        write(folder, kept)
    else:
        (folder / schema.SUMS).unlink()


def finalize(folder: Path) -> None:
    """Add the hashes of what a finished run has written."""
    found = read(folder)
    for name in schema.WRITTEN:
        if (folder / name).is_file():
            with (folder / name).open("rb") as file:
                found[name] = (hashlib.file_digest(file, "sha256").hexdigest(),)
    write(folder, found)


def accept(folder: Path) -> None:
    """Accept the files that define a run as they are now, at the user's request."""
    texts = {name: (folder / name).read_bytes() for name in schema.LAUNCH if (folder / name).is_file()}
    write(folder, {**read(folder), **{name: (hashlib.sha256(data).hexdigest(),) for name, data in texts.items()}})


def replace(path: Path, text: str) -> None:
    """Replace a listed file, so that it matches its hash even if the process is killed at any moment."""
    known = read(path.parent)
    new = of_texts({path.name: text})
    if path.name in known:
        write(path.parent, {**known, path.name: (*known[path.name], *new[path.name])})
    write_bytes_atomic(path, text.encode())
    if path.name in known:
        write(path.parent, {**known, **new})
