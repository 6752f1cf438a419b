"""The learner of docs/own_learner.md, taken from the page and used through --config-dir."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fedcl.contracts.learner import Plugin
from fedcl.models.flat import FlatModel
from fedcl.models.networks import MLP
from fedcl.results.checkpoint import Checkpoints

PAGE = (Path(__file__).resolve().parents[1] / "docs" / "own_learner.md").read_text()
SMALL = [
    "backend=inline", "num_clients=3", "rounds_per_task=1", "scenario.num_tasks=2", "compare_with=null",
    "strategy/projection=none", "run_dir=run",
]  # fmt: skip


def block(marker: str) -> str:
    """Return the fenced block of the page that follows ``marker``."""
    return PAGE.split(marker, 1)[1].split("```", 2)[1].split("\n", 1)[1]


def test_it_is_fifteen_lines_of_code() -> None:
    assert len([line for line in block("`my/hold.py`").splitlines() if line.strip()]) <= 15


def test_the_pages_learner_runs(tmp_path: Path) -> None:
    (tmp_path / "my" / "learner").mkdir(parents=True)
    (tmp_path / "my" / "hold.py").write_text(block("`my/hold.py`"))
    (tmp_path / "my" / "learner" / "hold.yaml").write_text(block("`my/learner/hold.yaml`"))
    command = [str(Path(sys.executable).parent / "fedcl"), "run", "--config-dir", "my", "learner=hold", *SMALL]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    state, clients = Checkpoints(tmp_path / "run").load()
    ended = state["server"]["models"]["*"]
    for _, own in clients.values():
        anchor = own["plugins"]["learner.hold"]
        assert torch.equal(torch.cat([tensor.flatten() for tensor in anchor.values()]), ended)
    assert len(clients) == 3


def test_it_holds_what_the_last_task_left(device: torch.device) -> None:
    names: dict[str, Any] = {}
    exec(block("`my/hold.py`"), names)
    model = FlatModel(MLP(input_shape=(2,), heads=(2,), hidden=(3,)), device=device)
    ctx: Any = SimpleNamespace(model=model)
    learner = names["Hold"](weight=0.5)
    assert learner.loss(ctx, None, None) == 0.0
    learner.after_task(ctx)
    later = names["Hold"](weight=0.5)
    later.load(learner.state())
    with torch.no_grad():
        model.flat.add_(2.0)
    assert later.loss(ctx, None, None).item() == pytest.approx(0.5 * 4.0 * model.num_parameters)


def test_the_page_names_every_hook() -> None:
    hooks = {name for name, value in vars(Plugin).items() if callable(value) and not name.startswith("_")}
    assert {name for name in hooks if f"`{name}`" not in PAGE} == set()
