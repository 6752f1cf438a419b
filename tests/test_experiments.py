"""Every experiment begins as a user types it, from any folder, with its reference; what gives way is said."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
import yaml

from fedcl.cli import main
from fedcl.config.compose import compose, list_choices, remarks
from fedcl.config.value_rules import ConfigError
from tests.toy import missing

EXPERIMENTS = [name for name, _ in list_choices("experiment")]
SHORT = ["backend=inline", "figures=false", "run_dir=run"]
# These take tens of seconds on one core; the others stand for them at every commit.
LONG = {
    "spread_fot",
    "spread_fedweit",
    "spread_glfc",
    "unlearning_fashion",
    "learners_cifar100",
    "fot_permuted_fashion",
}


def data_of(name: str) -> str:
    return f"data={Path(compose([f'experiment={name}'])['data']['root'] or 'digits').stem}"


@pytest.mark.usefixtures("one_round")
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in LONG else name for name in EXPERIMENTS]
)
def test_an_experiment_begins_from_any_folder_with_its_reference(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if why := missing(data_of(name)):
        pytest.skip(why)
    monkeypatch.chdir(tmp_path)
    assert main(["run", f"experiment={name}", *SHORT]) == 0
    said = capsys.readouterr().err
    cfg = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["rounds"] == 1
    assert (tmp_path / "run" / "reference" / "summary.json").is_file() == (cfg["compare_with"] is not None)
    assert ("left out" in said) == (name == "everything")


def test_the_flagships_reference_says_which_settings_gave_way() -> None:
    given = ["experiment=everything"]
    changes = shlex.split(compose(given)["compare_with"])
    assert remarks(given) == []
    assert [text for text in remarks(given, (), changes) if "left out" in text] == [
        "experiment=everything: strategy.collaboration.server.tau=0.5, strategy.collaboration.server.beta=20 left out: "
        "not for strategy/collaboration=fedavg",
        "experiment=everything: strategy.staleness.server.samples=16, strategy.staleness.server.iterations=50, "
        "strategy.staleness.server.max_steps=32 left out: not for strategy/staleness=none",
    ]
    reference = compose(given, (), changes)
    assert reference["strategy"]["collaboration"]["server"] == {
        "_target_": "strategies.collaboration.fedavg.FedAvg", "weighting": "num_examples",
    }  # fmt: skip
    assert (reference["client"]["epochs"], reference["devices"]["sigma"]) == (2, 1.0)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["experiment=everything", "data=digits"], "data.source.train_limit=2000 left out: not for data=digits"),
        (["experiment=spread_fot", "scenario=joint"], "scenario.num_tasks=10 left out: not for scenario=joint"),
        (
            ["experiment=fot_permuted_fashion", "strategy=flower_fedadam"],
            "strategy/collaboration=fedavg left out: strategy=flower_fedadam has no strategy/collaboration",
        ),
    ],
)
def test_what_does_not_fit_a_choice_gives_way_and_is_said(overrides: list[str], said: str) -> None:
    assert any(text.startswith(overrides[0]) and said in text for text in remarks(overrides))


def test_what_a_reference_does_not_take_of_the_command_line_gives_way_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], one_round: None
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["run", "strategy.projection.server.epsilon=0.8", "num_clients=3", *SHORT]) == 0
    assert (
        "fedcl: reference: the command line: strategy.projection.server.epsilon=0.8 left out: "
        "not for strategy/projection=none" in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["strategy/collaboration=fedavg", "strategy.collaboration.server.tau=0.5"], "tau=0.5: no such key"),
        (["experiment=everything", "strategy.collaboration.server.mu=1"], "mu=1: no such key"),
        (["scenario=joint", "scenario.num_tasks=5"], "scenario.num_tasks=5: must be int in [1, 1]"),
    ],
)
def test_what_is_typed_for_a_choice_that_does_not_take_it_is_a_mistake(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=r".") as caught:
        compose(overrides)
    assert message in str(caught.value)


def test_an_experiment_that_was_wrong_from_the_start_is_a_mistake_under_any_choice(tmp_path: Path) -> None:
    folder = tmp_path / "my" / "experiment"
    folder.mkdir(parents=True)
    (folder / "typo.yaml").write_text("# @package _global_\n# Wrong.\nscenario:\n  num_task: 3\n")
    for choice in ([], ["scenario=joint"]):
        with pytest.raises(ConfigError, match=r"scenario\.num_task=3: no such key; did you mean scenario\.num_tasks"):
            compose(["experiment=typo", *choice], [tmp_path / "my"])


def test_an_experiment_may_build_on_another_and_name_files_beside_it(tmp_path: Path) -> None:
    folder = tmp_path / "my" / "experiment"
    folder.mkdir(parents=True)
    (folder / "mine.yaml").write_text(
        "# @package _global_\n# Mine.\ndefaults:\n  - base\n  - override /learner: er\n  - _self_\nnum_clients: 3\n"
    )
    (folder / "base.yaml").write_text(
        "# @package _global_\n# Base.\ndefaults:\n  - override /devices: trace\n  - _self_\n"
        "num_clients: 4\nseed: 7\ndevices:\n  path: ./slow.csv\n"
    )
    cfg = compose(["experiment=mine"], [tmp_path / "my"])
    assert (cfg["num_clients"], cfg["seed"], list(cfg["learner"])) == (3, 7, ["er"])
    assert cfg["devices"]["path"] == str(folder / "slow.csv")


def test_there_are_experiments() -> None:
    assert {"first_run", "everything", "staleness_fashion"} <= set(EXPERIMENTS)
    assert set(EXPERIMENTS) > LONG
