"""fedcl export: a file that predicts what the run's model predicts, and that is trusted no further than it must be."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import save_file

from fedcl import results
from fedcl.assembly import make_model
from fedcl.cli import main
from fedcl.config.value_rules import ConfigError
from fedcl.results.checkpoint import Checkpoints
from fedcl.runs.export import ExportedModel, export, load_model
from fedcl.runs.setup import Setup

RunExperiment = Callable[..., Path]
SMALL = ("num_clients=3", "rounds_per_task=1", "scenario.num_tasks=2", "strategy/projection=none", "model.hidden=[8]")


def setup(folder: Path) -> Setup:
    return Setup.of(yaml.safe_load((folder / "config.yaml").read_text()))


def accuracy(model: ExportedModel, run: Setup, held: torch.Tensor, task: int) -> float:
    """Return the share of the task's test samples, among positions `held`, that the exported model gets right."""
    chosen = held[
        torch.isin(torch.from_numpy(run.dataset.test.y)[held], torch.tensor(model.about["tasks"][task]["classes"]))
    ]
    x = model.normalise(torch.from_numpy(run.dataset.test.x)[chosen])
    return int((model.predict(x, task) == torch.from_numpy(run.dataset.test.y)[chosen]).sum()) / len(chosen)


def test_the_global_model_bit_for_bit(
    run_experiment: RunExperiment, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = run_experiment("a", *SMALL)
    path = export(folder)
    assert path == folder / "model.safetensors"
    model, run = load_model(path), setup(folder)
    network = make_model(
        yaml.safe_load((folder / "config.yaml").read_text()), run.dataset, run.stream, torch.device("cpu")
    )
    network.load(Checkpoints(folder).load()[0]["server"]["models"]["*"])
    x = torch.from_numpy(run.dataset.normalise(run.dataset.test.x))
    assert torch.equal(model.normalise(torch.from_numpy(run.dataset.test.x)), x)
    assert torch.equal(model(x), network(x).logits)
    measured = results.load(folder).accuracy_matrix().to_numpy()[-1]
    everybody = torch.arange(len(run.dataset.test))
    assert [accuracy(model, run, everybody, task) for task in (0, 1)] == measured.tolist()
    with pytest.raises(ValueError, match="needs the task"):
        model.predict(x)
    with pytest.raises(ValueError, match=r"task=5: must be one of \[0, 1\]"):
        model.predict(x, 5)
    _check_damage(path, tmp_path)
    assert main(["export", str(folder), "--client", "1"]) == 2
    assert "has no model of its own" in capsys.readouterr().err
    assert main(["export", str(folder), "--client", "7", "--out", str(tmp_path / "x")]) == 2
    assert "never was of it" in capsys.readouterr().err
    assert main(["export", str(folder), "--out", "/dev/null"]) == 2
    assert Path("/dev/null").is_char_device()


def _check_damage(path: Path, tmp_path: Path) -> None:
    with safe_open(path, "pt") as file:
        about = json.loads(file.metadata()["fedcl"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    moved = {name: tensor + 1 for name, tensor in tensors.items()}
    foreign = {**about, "model": {"_target_": "os.system", "command": "true"}}
    for other, header, message in [
        (moved, about, "not those it was written with"),
        (tensors, foreign, "os"),
        (tensors, {"format": "none"}, "no model exported by fedcl"),
    ]:
        save_file(other, tmp_path / "other.safetensors", metadata={"fedcl": json.dumps(header)})
        with pytest.raises(ValueError, match=message):
            load_model(tmp_path / "other.safetensors")
    (tmp_path / "cut").write_bytes(path.read_bytes()[:-7])
    with pytest.raises(ValueError, match="cannot be read"):
        load_model(tmp_path / "cut")


def test_a_run_without_checkpoints_has_no_model(
    run_experiment: RunExperiment, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = run_experiment("a", *SMALL, "checkpoint.every=0")
    assert main(["export", str(folder)]) == 2
    assert "has no checkpoint" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("collaboration", ["local", "ditto", "fedrep", "ifca", "fedavg_ft", "fedcac", "apfl"])
def test_a_clients_own_model_is_the_one_that_was_measured(collaboration: str, run_experiment: RunExperiment) -> None:
    scenario = ("scenario=class_incremental", *SMALL)
    folder = run_experiment("a", *scenario, f"strategy/collaboration={collaboration}", "evaluation.personal=true")
    run, table = setup(folder), results.load(folder).metrics
    personal = table[(table["phase"] == "personal") & (table["after"] == 1)]
    for client in ("0", "2"):
        model = load_model(export(folder, client))
        held = torch.from_numpy(run.partition.test[int(client)])
        measured = personal[personal["client"] == client].set_index("task")["value"].to_dict()
        assert measured
        if collaboration == "fedavg_ft":  # tuned on each task before it is tested there: the file is that of the last
            measured = {1: measured[1]}
        assert {task: accuracy(model, run, held, task) for task in measured} == measured


@pytest.mark.slow
def test_predictions_of_no_one_network_are_refused(run_experiment: RunExperiment) -> None:
    folder = run_experiment("a", "scenario=class_incremental", *SMALL, "strategy/collaboration=fedcac_balanced")
    with pytest.raises(ConfigError, match="does not predict with the logits of one network"):
        export(folder, "0")
