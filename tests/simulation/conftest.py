from __future__ import annotations

import sys
from pathlib import Path

import pytest

# A learner whose clients misbehave on demand: real plugins, really run in workers.
FAULTY = '''
import os
from pathlib import Path

import torch

from fedcl.client.plugin import Context, Phase, Plugin, State


class Faulty(Plugin):
    """Raises, exits the process or returns rubbish at one visit of one client; otherwise counts its visits."""

    phase = Phase.BOOKKEEPING

    def __init__(self, *, client: str, visit: int, fault: str, marks: str) -> None:
        self.client, self.visit, self.fault, self.marks = client, visit, fault, marks
        self.visits = 0

    def before_round(self, ctx: Context) -> None:
        self.visits += 1
        ctx.model.flat += 1e-3 * self.visits
        if (ctx.client, ctx.visit) != (self.client, self.visit):
            return
        mark = Path(self.marks) / "died"
        if self.fault == "raise":
            raise ValueError("client says no")
        if self.fault == "exit_once" and not mark.exists():
            mark.touch()
            os._exit(7)
        if self.fault == "exit_always":
            os._exit(7)

    def after_step(self, ctx: Context) -> None:
        if (ctx.client, ctx.visit) == (self.client, self.visit) and self.fault == "rubbish":
            ctx.model.flat[3] = float("nan")

    def state(self) -> State:
        return {"visits": self.visits, "mark": torch.full((3,), float(self.visits))}

    def load(self, state: State) -> None:
        self.visits = int(state.get("visits", 0))
'''
YAML = """# A client that misbehaves.
faulty:
  _target_: faulty.Faulty
  client: "1"
  visit: 1
  fault: none
  marks: {marks}
  _allowed_:
    client: str
    fault: [none, raise, exit_once, exit_always, rubbish]
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
