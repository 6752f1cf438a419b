"""A certificate says what was done and hides who was meant by a sample; whatever is changed later is noticed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedcl.cli import main
from fedcl.results import sums
from fedcl.results.checkpoint import Checkpoints
from fedcl.runs.verify import verify
from fedcl.unlearning.certificate import FOLDER, SALT, digest, model_digest, sample_digest
from fedcl.unlearning.verification import read

RunExperiment = Callable[..., Path]
REQUESTS = (
    "{id: bob, scope: client, clients: [3], at: {round: 1}}, {id: c2, scope: class, classes: [2], at: {round: 1}}"
)
REQUESTS += ", {id: few, scope: sample, samples: [4, 17], at: end}"


@pytest.fixture(scope="module")
def certified(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from fedcl.config.compose import compose
    from fedcl.runs.experiment import run

    folder = tmp_path_factory.mktemp("certified") / "run"
    small = ["backend=inline", "compare_with=null", "figures=false", "num_clients=4", "scenario.num_tasks=2"]
    small += ["rounds_per_task=1", "strategy/projection=none", "unlearner=retrain", "scenario=class_incremental"]
    small += [f"unlearning.requests=[{REQUESTS}]", f"run_dir={folder}"]
    return run(compose(small), small, [], quiet=True)


@pytest.fixture
def folder(certified: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(certified, tmp_path / "run"))


def _paths(folder: Path) -> list[Path]:
    return sorted((folder / FOLDER).glob("*.json"))


def _edit(path: Path, *, sign: bool = False, **fields: Any) -> None:
    content = json.loads(path.read_text()) | fields
    if sign:
        content["sha256"] = digest(content)
    path.write_text(json.dumps(content))


def test_what_a_certificate_says(folder: Path) -> None:
    assert [path.name for path in _paths(folder)] == ["0001-bob.json", "0002-c2.json", "0003-few.json"]
    bob, c2, few = (json.loads(path.read_text()) for path in _paths(folder))
    assert bob["request"]["clients"] == ["3"]
    assert bob["processed_with"] == ["c2"]
    assert (bob["server_round"], c2["server_round"], few["server_round"]) == (1, 1, 2)
    assert bob["unlearner"] == {"name": "clients.unlearners.retrain.Retrain", "parameters": {}, "retrains": True}
    assert bob["guarantee"].startswith("exact:")
    assert bob["previous"] == ""
    assert (c2["previous"], few["previous"]) == (bob["sha256"], c2["sha256"])
    assert bob["model"]["before"] != bob["model"]["after"]
    state = Checkpoints(folder).load()[0]["server"]
    assert few["model"]["after"] == model_digest(state["models"])
    assert few["model"]["epoch"] == state["model_epoch"] == 2
    assert bob["cost"]["seconds"] > 0


def test_samples_appear_as_salted_digests_only(folder: Path) -> None:
    few = json.loads(_paths(folder)[2].read_text())
    salt = (folder / FOLDER / SALT).read_text().strip()
    assert few["request"]["samples"] == sorted(sample_digest(salt, position) for position in (4, 17))
    assert few["request"]["samples"] != sorted(sample_digest("", position) for position in (4, 17))
    assert (folder / FOLDER / SALT).stat().st_mode & 0o077 == 0


def test_valid_certificates_and_exact_ones_are_done_again(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(folder)]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out == [f"{path.name}: valid (chain, checkpoint, done again)" for path in _paths(folder)]


@pytest.mark.parametrize("place", [0, 1, 2])
def test_each_field_that_is_changed_is_noticed(place: int, folder: Path) -> None:
    path = _paths(folder)[place]
    whole = path.read_text()
    for name, value in json.loads(whole).items():
        changed: Any = {
            str: f"{value}x" if isinstance(value, str) else "", int: -1, list: ["other"], dict: {"other": 1}
        }[type(value)]  # fmt: skip
        _edit(path, **{name: changed})
        assert read(folder)[place].faults, name
        rest = {key: entry for key, entry in json.loads(whole).items() if key != name}
        path.write_text(json.dumps(rest))
        assert read(folder)[place].faults, name
    _edit(path, extra=1)
    assert read(folder)[place].faults
    path.write_text(whole)
    assert not any(finding.faults for finding in read(folder))


def test_a_changed_certificate_that_was_signed_again_breaks_the_next(folder: Path) -> None:
    _edit(_paths(folder)[0], sign=True, guarantee="exact: promised")
    assert [bool(finding.faults) for finding in read(folder)] == [False, True, False]
    assert not verify(folder, retrain=False)


def test_the_last_one_signed_again_contradicts_the_run(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _edit(_paths(folder)[2], sign=True, model={"before": "0" * 64, "after": "1" * 64, "epoch": 2})
    assert not any(finding.faults for finding in read(folder))
    assert main(["verify", str(folder), "--no-replay"]) == 1
    out = capsys.readouterr().out
    assert "model.after: the checkpoint holds other models" in out
    assert "events.jsonl recorded another hash" in out


def test_models_that_training_all_over_does_not_give_are_noticed(folder: Path) -> None:
    """Even where everything else was changed along."""
    first = _paths(folder)[0]
    content = json.loads(first.read_text())
    _edit(first, sign=True, model={**content["model"], "after": "1" * 64})
    previous, hashes = "", {}
    for path in _paths(folder):
        if previous:
            _edit(path, sign=True, previous=previous)
        content = json.loads(path.read_text())
        previous = content["sha256"]
        hashes[content["request"]["id"]] = previous
    events = folder / "events.jsonl"
    rows = [json.loads(line) for line in events.read_text().splitlines()]
    for row in rows:
        if row["kind"] == "request_certified":
            row["sha256"] = hashes[row["request"]]
    events.write_text("".join(json.dumps(row) + "\n" for row in rows))
    sums.finalize(folder)
    assert verify(folder, retrain=False)
    assert not verify(folder)


@pytest.mark.parametrize("gone", [0, 1, 2])
def test_a_removed_certificate_is_noticed(gone: int, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _paths(folder)[gone].unlink()
    assert main(["verify", str(folder), "--no-replay"]) == 1
    assert "missing" in capsys.readouterr().out


def test_all_certificates_removed_are_noticed(folder: Path) -> None:
    shutil.rmtree(folder / FOLDER)
    assert not verify(folder, retrain=False)


def test_certificates_in_another_order_are_noticed(folder: Path) -> None:
    first, second, _ = _paths(folder)
    a, b = first.read_text(), second.read_text()
    first.write_text(b)
    second.write_text(a)
    assert [bool(finding.faults) for finding in read(folder)][:2] == [True, True]
    first.unlink()
    second.unlink()
    (folder / FOLDER / "0001-c2.json").write_text(b)
    (folder / FOLDER / "0002-bob.json").write_text(a)
    assert [bool(finding.faults) for finding in read(folder)][:2] == [True, True]
    (folder / FOLDER / "0002-c2.json").write_text(b)
    assert any("two certificates with the number 2" in fault for finding in read(folder) for fault in finding.faults)


def test_rubbish_in_the_folder_does_not_stop_the_check(folder: Path) -> None:
    _paths(folder)[1].write_bytes(b"\xff{")
    (folder / FOLDER / "notes.txt").write_text("mine")
    faults = [finding.faults for finding in read(folder)]
    assert faults[1][0].startswith("cannot be read")
    assert faults[2] == ["previous: is not the certificate before it"]


def test_a_run_without_certificates_is_bad_input(run_small: RunExperiment, tmp_path: Path) -> None:
    assert main(["verify", str(run_small("none"))]) == 2
    assert main(["verify", str(tmp_path)]) == 2
