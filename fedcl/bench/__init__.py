"""Measurements that fedcl makes of itself, by name: ``fedcl bench NAME`` runs one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from fedcl.bench.learners import learners
from fedcl.bench.repro import repro
from fedcl.bench.result import Result
from fedcl.bench.server import server
from fedcl.files import write_atomic
from fedcl.rules import ConfigError

BENCHES: dict[str, Callable[[], Result]] = {"repro": repro, "server": server, "learners": learners}


def bench(name: str, json_file: Path | None) -> Result:
    """Run a measurement, print its table, and write it to ``json_file`` if one is given.

    Raises
    ------
    ConfigError
        If there is no such measurement, or the file's folder does not exist; nothing has been run then.
    """
    if name not in BENCHES:
        raise ConfigError(f"{name}: no such measurement; known: {', '.join(BENCHES)}")
    if json_file is not None and not json_file.parent.is_dir():
        raise ConfigError(f"--json {json_file}: its folder does not exist")
    result = BENCHES[name]()
    print(result.table(), flush=True)
    print(f"ratio {result.ratio:.3g}", flush=True)
    if json_file is not None:
        write_atomic(json_file, result.to_json())
    return result
