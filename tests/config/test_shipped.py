"""A user's own YAML without rules is checked by those of the shipped files that name the same component."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedcl.config.compose import compose
from fedcl.config.value_rules import ConfigError


def own(folder: Path, place: str, text: str) -> list[str]:
    file = folder / f"{place}/mine.yaml"
    file.parent.mkdir(parents=True)
    file.write_text(f"# Mine.\n{text}")
    return [f"{place}=mine"]


@pytest.mark.parametrize(
    ("place", "text", "said"),
    [
        (
            "model",
            "_target_: fedcl.models.resnet.ResNet\nblocks: [1]\nnorm: grup",
            "model.norm=grup: must be one of group, batch, none",
        ),
        (
            "scenario",
            "_target_: fedcl.scenario.streams.ClassIncremental\ntrain_masking: tusk",
            "scenario.train_masking=tusk: must be one of task, seen, all, batch",
        ),
        (
            "unlearner",
            "_target_: clients.unlearners.random_label.RandomLabel\noptimizer: adm",
            "unlearner.optimizer=adm: must be one of",
        ),
        (
            "unlearner",
            "_target_: clients.unlearners.fine_tune.FineTune\nrounds: -1",
            "unlearner.rounds=-1: must be int >= ",
        ),
        (
            "learner",
            "mine:\n  _target_: clients.learners.nmc.NearestClassMean\n  distance: cos",
            "learner.mine.distance=cos: must be one of",
        ),
        (
            "data/augment",
            "_target_: fedcl.data.augmentation.Views\nflip: 2",
            "data.augment.flip=2: must be number in",
        ),
    ],
)
def test_a_value_that_no_shipped_file_allows_is_refused(place: str, text: str, said: str, tmp_path: Path) -> None:
    choice = own(tmp_path, place, text)
    with pytest.raises(ConfigError) as caught:
        compose(choice, [tmp_path])
    assert said in str(caught.value)


def test_what_one_of_several_files_allows_is_allowed(tmp_path: Path) -> None:
    choice = own(tmp_path, "data/augment", "_target_: fedcl.data.augmentation.Views\npadding: 0\nflip: 0.0")
    assert compose(choice, [tmp_path])["data"]["augment"]["padding"] == 0


def test_a_rule_of_ones_own_comes_first(tmp_path: Path) -> None:
    text = "_target_: fedcl.models.networks.MLP\nhidden: [8]\ndropout: null\nhead: linear\n_allowed_: {head: [linear]}"
    choice = own(tmp_path, "model", text)
    assert compose(choice, [tmp_path])["model"]["head"] == "linear"
    with pytest.raises(ConfigError, match=r"model\.head=cosine: must be one of linear"):
        compose([*choice, "model.head=cosine"], [tmp_path])
