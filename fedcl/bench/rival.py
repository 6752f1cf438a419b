"""Another simulator, in its own process, that runs rounds on command.

Both ends of the pipe are here. A line of JSON goes to the rival (``{"rounds": 3}`` or ``{"save": path}``), and a line
comes back when it is done. The rival's own output goes to a log.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedcl.bench.processes import tree_seconds
from fedcl.bench.turns import Side
from fedcl.bench.workload import Workload

ROOT = Path(__file__).resolve().parents[2]


class Rival:
    """The measuring end: starts ``python -m module`` and waits until it is ready for its first round.

    Parameters
    ----------
    module
        What to run; it calls :func:`serve`.
    workload
        What to train.
    python
        The interpreter; it needs only the packages of the other simulator.

    Raises
    ------
    RuntimeError
        If it ends early, with the end of its log.
    """

    def __init__(self, module: str, workload: Workload, python: str = sys.executable) -> None:
        self._open = ExitStack()
        folder = Path(self._open.enter_context(tempfile.TemporaryDirectory(prefix="fedcl-bench-")))
        self._log, self._saved = folder / "log", folder / "weights.npy"
        ask, self._to = os.pipe()
        back, answer = os.pipe()
        arguments = [python, "-m", module, str(ask), str(answer), json.dumps(vars(workload))]
        paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
        with self._log.open("wb") as log:
            streams: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": log}
            self._process = subprocess.Popen(arguments, env=env, pass_fds=(ask, answer), **streams)
        os.close(ask)
        os.close(answer)
        self._answers = self._open.enter_context(os.fdopen(back, "r", encoding="utf-8"))
        self._answer()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """End it, and wait for it."""
        os.close(self._to)  # the end of its input is the end of its work
        try:
            self._process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._open.close()

    @property
    def pid(self) -> int:
        """Its process."""
        return self._process.pid

    def run(self, rounds: int) -> Mapping[str, Any]:
        """Run ``rounds`` more rounds; return its report of them."""
        return self._ask({"rounds": rounds})

    def weights(self) -> Tensor:
        """Return its global model (P,)."""
        self._ask({"save": str(self._saved)})
        return torch.from_numpy(np.load(self._saved))

    def side(self, name: str) -> Side:
        """Return it as a side; its processor time is that of all its processes."""
        return Side(name, self.run, lambda: tree_seconds(self.pid))

    def _ask(self, command: Mapping[str, Any]) -> Mapping[str, Any]:
        os.write(self._to, (json.dumps(command) + "\n").encode())
        return self._answer()

    def _answer(self) -> Mapping[str, Any]:
        line = self._answers.readline()
        if not line:
            log = self._log.read_text(errors="replace")[-2000:]
            raise RuntimeError(f"the other simulator ended before it was done (status {self._process.poll()}):\n{log}")
        answer: Mapping[str, Any] = json.loads(line)
        return answer


class Orders:
    """The rival's end: its commands, one after the other; asking for the next says that the last is done."""

    def __init__(self, arguments: Sequence[str]) -> None:
        ask, answer, workload = arguments
        self._asked = os.fdopen(int(ask), "r", encoding="utf-8")
        self._answers = os.fdopen(int(answer), "w", encoding="utf-8")
        known = json.loads(workload)
        self.workload = Workload(**{**known, "sizes": tuple(known["sizes"])})

    def rounds(self, weights: Callable[[], NDArray[np.float32]]) -> int:
        """Report that the last command is done; return how many rounds to run next, 0 at the end.

        ``weights`` returns the current global model (P,).
        """
        while True:
            self._answers.write(json.dumps({"done": True}) + "\n")
            self._answers.flush()
            line = self._asked.readline()
            if not line:
                self._asked.close()
                self._answers.close()
                return 0
            command = json.loads(line)
            if "rounds" in command:
                return int(command["rounds"])
            np.save(command["save"], weights())
