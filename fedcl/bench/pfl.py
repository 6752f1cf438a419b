"""How much faster a round is than under pfl-research (0.6.0), with one process each."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from fedcl.bench.flower import against
from fedcl.bench.result import Result
from fedcl.bench.rival import Rival
from fedcl.bench.workload import Workload, known

VERSION, MARK = "0.6.0", 1.4
REPETITIONS = 7


def pfl(model: str = "mlp", python: Path | None = None, repetitions: int = REPETITIONS) -> Result:
    """Run the same rounds under pfl's simulation and on fedcl's inline backend, in turn, one process and thread each.

    ``python`` is the interpreter of an environment that has pfl; None is this one.

    Returns
    -------
    Result
        One row a side. ``ratio`` is pfl's processor time over fedcl's; passed if the mark is reached and the two final
        models are the same up to rounding. Without pfl the measurement is skipped.
    """
    workload, interpreter = Workload(known(model)), str(python or sys.executable)
    found = version(interpreter)
    if found != VERSION:
        what = "is not installed there" if found is None else f"is {found} there"
        return Result.skipped("pfl", f"needs pfl=={VERSION} for {interpreter}; it {what}: benchmarks/pfl/README.md")
    rival = Rival("fedcl.bench.pfl_app", workload, interpreter)
    return against(rival, workload, ("backend=inline",), repetitions, ("pfl", f"pfl {VERSION}"), (MARK, None))


def version(python: str) -> str | None:
    """Return the version of pfl that an interpreter finds; None if it finds none.

    Raises
    ------
    OSError
        If there is no such interpreter.
    """
    code = "import importlib.metadata as m; print(m.version('pfl'))"
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    return done.stdout.strip() if done.returncode == 0 else None
