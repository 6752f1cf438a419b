"""Measurements that fedcl makes of itself, by name: ``fedcl bench NAME`` runs one."""

from __future__ import annotations

import importlib
import inspect
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedcl.base.files import write_atomic
from fedcl.config.value_rules import ConfigError

if TYPE_CHECKING:
    from fedcl.bench.result import Result

# Each is a module of this package with a function of its name. Imported when it is asked for: other simulators' own
# processes import from here too, and have none of what fedcl needs.
BENCHES = ("repro", "server", "learners", "engine", "overhead", "flower", "pfl", "scale", "hetero", "gpu")


def measurement(name: str) -> Callable[..., Result]:
    """Return the measurement called ``name``.

    Raises
    ------
    ConfigError
        If there is none.
    """
    if name not in BENCHES:
        raise ConfigError(f"{name}: no such measurement; known: {', '.join(BENCHES)}")
    found: Callable[..., Result] = getattr(importlib.import_module(f"fedcl.bench.{name}"), name)
    return found


def bench(name: str, json_file: Path | None, **options: Any) -> Result:
    """Run a measurement and print its table; write it to ``json_file`` if one is given and it could be made here.

    Parameters
    ----------
    name
        Which one.
    json_file
        Where its JSON goes; None for nowhere.
    **options
        What the command line sets, such as ``model``; None is not set.

    Raises
    ------
    ConfigError
        If there is no such measurement, it has no such option, or the file's folder does not exist; nothing has been
        run then.
    """
    measure = measurement(name)
    given = {key: value for key, value in options.items() if value is not None}
    unknown = sorted(given.keys() - inspect.signature(measure).parameters.keys())
    if unknown:
        raise ConfigError(f"bench {name}: has no option --{unknown[0]}")
    if json_file is not None and not json_file.parent.is_dir():
        raise ConfigError(f"--json {json_file}: its folder does not exist")
    before = os.getloadavg()[0]
    result = measure(**given)
    if result.rows:
        print(result.table(), flush=True)
    for note in result.notes:
        print(note)
    if not result.rows:
        return result  # it could not be measured here, and has said why
    print(f"load average {before:.1f} before, {os.getloadavg()[0]:.1f} after, on {os.cpu_count()} cores")
    print(f"ratio {result.ratio:.3g}", flush=True)
    if json_file is not None:
        write_atomic(json_file, result.to_json(before))
    return result
