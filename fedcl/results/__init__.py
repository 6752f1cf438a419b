"""A run's results: what is recorded while it goes on, and the views of it afterwards.

``fedcl.results.load(run_dir)`` is the way in for notebooks. Everything is imported on first use, so that a device can
record without pandas or matplotlib.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedcl.results.environment import create_run_dir, environment
    from fedcl.results.recorder import Recorder
    from fedcl.results.run import Run, load

__all__ = ["Recorder", "Run", "create_run_dir", "environment", "load"]

_HOME = {
    "load": "run",
    "Run": "run",
    "Recorder": "recorder",
    "create_run_dir": "environment",
    "environment": "environment",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value
