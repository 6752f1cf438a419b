"""protocol=two_phase: tuned on one data set, evaluated on another, and gone on with where it stopped."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml

from fedcl.cli import main
from fedcl.results.intervals import half_width
from tests.toy import write_files

SMALL = [
    "backend=inline", "scenario=class_incremental", "scenario.num_tasks=2", "num_clients=2", "rounds_per_task=1",
    "strategy/projection=none", "compare_with=null", "figures=false", "model.hidden=[8]", "protocol=two_phase",
    "protocol.search=['client.optimizer.lr=1e-6,0.3']", "protocol.tune_seeds=[3]", "protocol.evaluate_seeds=[0,1]",
]  # fmt: skip


@pytest.mark.slow
def test_both_phases_and_going_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    toy = write_files(tmp_path)["npz"]
    command = ["run", *SMALL, f"protocol.evaluate_on=['data=npz','data.root={toy}']", f"run_dir={tmp_path / 'out'}"]
    assert main(command) == 0
    out = tmp_path / "out"
    assert yaml.safe_load((out / "best.yaml").read_text()) == ["client.optimizer.lr=0.3"]
    result = json.loads((out / "protocol.json").read_text())
    assert [row["settings"] for row in result["tuned"]] == [["client.optimizer.lr=1e-6"], ["client.optimizer.lr=0.3"]]
    assert result["tuned"][0]["mean"] < result["tuned"][1]["mean"]
    evaluated = [json.loads((out / f"evaluate/seed_{s}/summary.json").read_text())["accuracy/average"] for s in (0, 1)]
    assert result["evaluated"]["accuracy/average"]["values"] == evaluated
    kept = (out / "tune/1/seed_3/summary.json").stat().st_mtime_ns
    shutil.rmtree(out / "evaluate/seed_1")
    assert main(command) == 0
    assert (out / "tune/1/seed_3/summary.json").stat().st_mtime_ns == kept
    assert json.loads((out / "protocol.json").read_text())["evaluated"]["accuracy/average"]["values"] == evaluated
    assert main([*command, "protocol.tune_seeds=[4]"]) == 2
    assert "holds another protocol" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["protocol.evaluate_on=['data=digits','data.partition.alpha=9']"], "must be another data set"),
        ([], "protocol.evaluate_on=[]: must be a list"),
        (["protocol.evaluate_on=['data=mnist']", "protocol.search=[seed]"], "protocol.search[0]=seed"),
    ],
)
def test_what_is_no_plan_is_refused(
    extra: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", *SMALL, *extra, f"run_dir={tmp_path / 'out'}"]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_intervals_by_hand() -> None:
    assert half_width([1.0, 2.0, 3.0]) == pytest.approx(4.302653 / 3**0.5)
    assert half_width([0.0, 1.0] * 50) == pytest.approx(1.984217 * 0.5025189 / 10)
    with pytest.raises(ValueError, match="needs two"):
        half_width([1.0])
