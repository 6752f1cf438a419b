"""Folders that a command is given."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from fedcl.config.value_rules import ConfigError

FAILED = 1
"""Exit status of a command that did its work and found, or made, what should not be."""


if TYPE_CHECKING:
    from fedcl.results.launches import Trust


def add_trust(command: argparse.ArgumentParser) -> None:
    """Add ``--trust`` to a command that goes on with what a folder says."""
    command.add_argument(
        "--trust", action="store_true", help="run also code of others that the folder names, from wherever it says"
    )


def trust_of(args: argparse.Namespace) -> Trust:
    """Return what the command line lets a folder do."""
    from fedcl.results.launches import Trust

    return Trust(tuple(args.config_dir), args.trust)


def run_folder(path: Path) -> Path:
    """Return the path of a run's folder; ConfigError, with what may have been meant, if it is none."""
    if (path / "config.yaml").exists():
        return path
    if any((path / name).exists() for name in ("STATUS", "metrics.jsonl", "summary.json")):
        raise ConfigError(f"{path / 'config.yaml'}: is missing; restore it from a copy of the folder, or run it again")
    if any((path / name).exists() for name in (".lock", "overrides.yaml", "env.json")):
        raise ConfigError(
            f"{path}: the run ended before its configuration was written; start it again with run_dir={path}"
        )
    if not path.exists():
        raise ConfigError(f"{path}: not a run's folder, nothing is there; a run prints its own as its last line")
    newest = max(path.glob("*/config.yaml"), key=lambda config: config.stat().st_mtime, default=None)
    meant = "" if newest is None else f"; the newest run in it is {newest.parent}"
    raise ConfigError(f"{path}: not a run's folder, it has no config.yaml{meant}")


def file_to_write(path: Path) -> Path:
    """Return the path of a file that is to be made or replaced.

    Raises
    ------
    ConfigError
        If its folder does not exist, or the path names something that is no plain file: a writer that renames over its
        target would put a file in a device's place.
    """
    if path.exists() and not path.is_file():
        raise ConfigError(f"--out {path}: must be a file's name, but is a folder or a device")
    if not path.parent.is_dir():
        raise ConfigError(f"--out {path}: there is no folder {path.parent}")
    return path
