from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# A learner whose clients misbehave on demand: a real plugin, really run in workers.
FAULTY = '''
import os
import signal
import time
from pathlib import Path

import ray
import torch

from fedcl.contracts.learner import Context, Phase, Plugin, State


class Faulty(Plugin):
    """Misbehaves at one visit of the named clients, written "client:fault ..."; otherwise counts its visits."""

    phase = Phase.BOOKKEEPING

    def __init__(self, *, faults: str, visit: int, marks: str, delay: float) -> None:
        self.faults = dict(entry.split(":") for entry in faults.split())
        self.visit, self.marks, self.delay = visit, Path(marks), delay
        self.visits = 0

    def before_round(self, ctx: Context) -> None:
        self.visits += 1
        ctx.model.flat += 1e-3 * self.visits
        time.sleep(self.delay)
        if self.delay and ray.is_initialized():
            (self.marks / f"node-{ray.get_runtime_context().get_node_id()}").touch()
        fault = self._fault(ctx)
        if fault.endswith("_once"):
            mark = self.marks / f"{ctx.client}-{fault}"
            fault = "" if mark.exists() else fault.removesuffix("_once")
            mark.touch()
        if fault == "raise":
            raise ValueError("client says no")
        if fault == "leave":
            raise SystemExit(3)
        if fault == "interrupt":
            raise KeyboardInterrupt
        if fault == "memory":
            raise MemoryError("cannot allocate a tebibyte")
        if fault == "exit":
            os._exit(7)
        if fault == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if fault == "hang":
            time.sleep(600)
        if fault == "mark":
            (self.marks / "now").touch()

    def after_step(self, ctx: Context) -> None:
        if self._fault(ctx) == "rubbish":
            ctx.model.flat[3] = float("nan")

    def _fault(self, ctx: Context) -> str:
        return self.faults.get(ctx.client, "") if ctx.local_round == self.visit else ""

    def state(self) -> State:
        return {"visits": self.visits, "mark": torch.full((3,), float(self.visits))}

    def load(self, state: State) -> None:
        self.visits = int(state.get("visits", 0))
'''
YAML = """# Clients that misbehave.
faulty:
  _target_: faulty.Faulty
  faults: ""
  visit: 1
  marks: {marks}
  delay: 0.0
"""


@pytest.fixture
def faulty_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a --config-dir with the learner ``faulty``, whose module lies in it."""
    folder = tmp_path / "mine"
    (folder / "learner").mkdir(parents=True)
    (folder / "faulty.py").write_text(FAULTY)
    (folder / "learner" / "faulty.yaml").write_text(YAML.format(marks=tmp_path))
    for module in ("faulty", "broken"):
        sys.modules.pop(module, None)  # of an earlier test's folder
    monkeypatch.syspath_prepend(str(folder))
    return folder


Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start_apart(tmp_path: Path, end_processes: Callable[[str], None]) -> Iterator[Start]:
    """Return a function that starts Python in a process of its own; whatever it leaves is ended by process id."""
    if not Path("/proc").is_dir():
        pytest.skip("finds the processes it started through /proc")
    tag = f"FEDCL_TEST_TAG={tmp_path}"
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "FEDCL_TEST_TAG": str(tmp_path), "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    environment.pop("RAY_ADDRESS", None)

    def start(*arguments: str) -> subprocess.Popen[str]:
        pipe = subprocess.PIPE
        command = [sys.executable, *arguments]
        return subprocess.Popen(command, env=environment, stdout=pipe, stderr=subprocess.STDOUT, text=True)

    yield start
    end_processes(tag)
