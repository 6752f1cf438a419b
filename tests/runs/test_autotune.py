"""engine=tune, and what engine=stack says where it cannot be had."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from fedcl.cli import main

SMALL = [
    "backend=inline", "scenario.num_tasks=2", "num_clients=3", "rounds_per_task=1", "compare_with=null",
    "strategy/projection=none", "figures=false", "model.hidden=[8]",
]  # fmt: skip


def test_the_measured_engine_is_what_the_run_says(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", *SMALL, "engine=tune", f"run_dir={tmp_path / 'run'}"]) == 0
    cfg = yaml.safe_load((tmp_path / "run/config.yaml").read_text())
    assert cfg["engine"] in ("loop", "fused", "stack")
    said = capsys.readouterr().err
    assert f"engine={cfg['engine']}: processor time of a client's visit: loop " in said
    assert f"engine={cfg['engine']}" in yaml.safe_load((tmp_path / "run/overrides.yaml").read_text())


@pytest.mark.slow
def test_a_learner_that_cannot_be_stacked_is_named_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["run", *SMALL, "engine=stack", f"run_dir={tmp_path / 'run'}"]
    assert main([*command[:-1], "learner=ewc", command[-1]]) == 0
    said = capsys.readouterr().err
    assert said.count("engine=stack: clients are trained one after another, since EWC takes part in every step") == 1
