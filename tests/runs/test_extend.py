"""fedcl extend: what a longer run ends with is what it would have been from the start, or it is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
import torch

from fedcl.cli import main
from fedcl.config.value_rules import ConfigError
from fedcl.results import load
from fedcl.results.checkpoint import Checkpoints
from fedcl.runs.experiment import resume
from fedcl.runs.extend import extend

RunExperiment = Callable[..., Path]
Hash = Callable[[Path], str]
SMALL = ("num_clients=3", "model.hidden=[8]", "checkpoint.min_seconds=0", "client.optimizer.momentum=0.5")
DOMAINS = (*SMALL, "scenario=domain_permuted", "strategy/projection=none", "learner=er")


def model_of(folder: Path) -> torch.Tensor:
    model: torch.Tensor = Checkpoints(folder).load()[0]["server"]["models"]["*"]
    return model


@pytest.mark.slow
def test_more_tasks_end_with_the_same_bits(run_experiment: RunExperiment, tmp_path: Path) -> None:
    short = run_experiment("short", *DOMAINS, "scenario.num_tasks=2", "rounds_per_task=2")
    whole = run_experiment("whole", *DOMAINS, "scenario.num_tasks=3", "rounds_per_task=2")
    before = {path.name: path.read_bytes() for path in short.iterdir() if path.is_file()}
    longer = extend(short, ["scenario.num_tasks=3", f"run_dir={tmp_path / 'longer'}"], force=False, quiet=True)
    assert torch.equal(model_of(longer), model_of(whole))
    assert {path.name: path.read_bytes() for path in short.iterdir() if path.is_file()} == before
    one, two = load(longer), load(whole)
    unknown = (two.metrics["phase"] == "test") & (two.metrics["task"] == 2) & (two.metrics["round"] < 4)
    pd.testing.assert_frame_equal(one.metrics, two.metrics[~unknown].reset_index(drop=True))
    assert one.summary["accuracy/average"] == two.summary["accuracy/average"]
    assert one.events["tasks"].iloc[0] == two.events["tasks"].iloc[0]
    assert one.env["launch"]["extends"] == str(short)
    resume(longer, force=False, quiet=True)  # an ordinary run from now on


@pytest.mark.slow
@pytest.mark.parametrize("projection", ["none", "fot"])
def test_more_rounds_are_the_same_table(
    projection: str, run_experiment: RunExperiment, metrics_hash: Hash, tmp_path: Path
) -> None:
    settings = (*SMALL, "scenario.num_tasks=2", f"strategy/projection={projection}")
    short = run_experiment("short", *settings, "rounds_per_task=[2,2]")
    whole = run_experiment("whole", *settings, "rounds_per_task=[2,4]")
    line = ["extend", str(short), "rounds_per_task=[2,4]", f"run_dir={tmp_path / 'longer'}", "--quiet"]
    assert main(line) == 0
    assert metrics_hash(tmp_path / "longer") == metrics_hash(whole)


@pytest.mark.slow
def test_what_cannot_be_is_refused_and_leaves_nothing(run_experiment: RunExperiment, tmp_path: Path) -> None:
    short = run_experiment("short", *SMALL, "scenario.num_tasks=2", "rounds_per_task=2", "checkpoint.keep=1")
    new = f"run_dir={tmp_path / 'new'}"
    for overrides, message in [
        (["scenario.num_tasks=5"], "heads of"),
        (["client.epochs=2"], r"client.epochs: 1 -> 2: only rounds_per_task and scenario"),
        (["rounds_per_task=2"], "leaves nothing to run"),
        (["rounds_per_task=[2,3]"], r"needs a checkpoint of the first 3 rounds or fewer.* after 4"),
    ]:
        with pytest.raises(ConfigError, match=message):
            extend(short, [*overrides, new], force=False, quiet=True)
    single = run_experiment("single", "scenario=class_incremental", *SMALL, "scenario.num_tasks=2", "rounds_per_task=1")
    with pytest.raises(ConfigError, match="task 0 would have had other classes"):
        extend(single, ["scenario.num_tasks=5", new], force=False, quiet=True)
    horizon = (
        "strategy/projection=none",
        "strategy/collaboration=fedcac",
        "scenario=domain_permuted",
        "rounds_per_task=1",
    )
    reckons = run_experiment("reckons", *SMALL, *horizon, "scenario.num_tasks=2")
    with pytest.raises(ConfigError, match="depends on the rounds of the whole run"):
        extend(reckons, ["scenario.num_tasks=9", new], force=False, quiet=True)
    decays = ("client/schedule=linear", "client.schedule.horizon=run", "strategy/projection=none")
    faded = run_experiment(
        "faded", *SMALL, *decays, "scenario=domain_permuted", "scenario.num_tasks=2", "rounds_per_task=1"
    )
    with pytest.raises(ConfigError, match="the past would have had other learning rates"):
        extend(faded, ["scenario.num_tasks=3", new], force=False, quiet=True)
    (short / "STATUS").write_text("interrupted\n")
    with pytest.raises(ConfigError, match="is interrupted, not done"):
        extend(short, ["rounds_per_task=3", new], force=False, quiet=True)
    assert not (tmp_path / "new").exists()


def test_a_folder_that_is_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["extend", str(tmp_path), "rounds_per_task=3"]) == 2
    assert "not a run's folder" in capsys.readouterr().err
