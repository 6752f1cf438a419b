"""What a certificate measures besides the panel's own numbers: KLoM, a backdoor, and the cost of training all over."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedcl.assembly import load_dataset
from fedcl.cli import main
from fedcl.config.compose import ConfigError, compose
from fedcl.evaluation.klom import ensemble_distance, klom
from fedcl.evaluation.unlearning import backdoor
from fedcl.runs.unlearning_metrics import marked

RunExperiment = Callable[..., Path]
SETS = ("forget_train", "forget_test", "retain_train", "retain_test")
CLASS = "{id: two, scope: class, classes: [2], at: {round: 2}}"
TRIGGER = "unlearning.trigger={pixels: [27, 28], value: 16, label: 1}"


def certificate(folder: Path) -> dict[str, Any]:
    [path] = (folder / "certificates").glob("*.json")
    return dict(json.loads(path.read_text()))


def test_an_ensemble_is_told_apart_set_by_set_with_its_count_and_floor() -> None:
    draw = torch.Generator().manual_seed(0)
    oracle = {"a": torch.randn(8, 50, generator=draw), "b": torch.randn(8, 50, generator=draw)}
    mine = {"a": oracle["a"][:6].clone(), "b": oracle["b"][:6] + 3}
    numbers = ensemble_distance(mine, oracle)
    assert numbers["klom/models"] == 6
    assert numbers["klom/a"] == klom(mine["a"], oracle["a"]).mean
    assert numbers["klom/a"] < numbers["klom/a_floor"] < numbers["klom/b"]
    assert numbers["klom/b_floor"] == klom(oracle["b"][:4], oracle["b"][4:]).mean
    assert numbers["klom/b_p95"] == klom(mine["b"], oracle["b"]).percentile_95
    assert "klom/a_floor" not in ensemble_distance({"a": oracle["a"][:3]}, {"a": oracle["a"][:3]})


def test_a_backdoors_success_and_what_is_recovered_by_hand() -> None:
    targets = torch.tensor([0, 1, 2, 1])

    def says(*classes: int) -> torch.Tensor:
        return torch.eye(3)[list(classes)]

    logits = {"": says(0, 2, 2, 1), "original/": says(2, 2, 2, 2), "reference/": says(0, 1, 2, 1)}
    numbers = backdoor(logits, targets, 2)
    # of the three samples that are no 2 the models call 1, 3 and 0 a 2; right are 3, 1 and 4 of four
    assert numbers == pytest.approx(
        {"backdoor": 1 / 3, "original/backdoor": 1.0, "reference/backdoor": 0.0, "recovery": (3 - 1) / (4 - 1)}
    )
    assert "recovery" not in backdoor({"": logits[""]}, targets, 2)


def test_a_trigger_marks_test_samples_and_nothing_else() -> None:
    dataset = load_dataset(compose(["data=digits"]))
    done = marked(dataset, {"pixels": [27, 28], "value": 16, "label": 1})
    flat, was = done.test.x.reshape(len(done.test), -1), dataset.test.x.reshape(len(dataset.test), -1)
    assert (flat[:, 27:29] == 16).all()
    rest = np.delete(np.arange(flat.shape[1]), [27, 28])
    assert np.array_equal(flat[:, rest], was[:, rest])
    assert not np.array_equal(flat, was)
    assert done.train is dataset.train
    for trigger, words in (
        ({"pixels": [64], "value": 1, "label": 1}, "must be places in 0..63"),
        ({"pixels": [True], "value": 1, "label": 1}, "must be places in 0..63"),
        ({"pixels": [1], "value": 1, "label": 10}, "must be in 0..9"),
    ):
        with pytest.raises(ConfigError, match=words):
            marked(dataset, trigger)


def test_one_model_is_no_distribution(run_small: RunExperiment) -> None:
    with pytest.raises(ConfigError, match=r"unlearning\.klom=1"):
        run_small("a", "unlearning.klom=1")


@pytest.mark.slow
def test_retraining_is_at_no_distance_from_itself(run_small: RunExperiment) -> None:
    more = ["unlearner=retrain", "unlearning.klom=3", "unlearning.reference=true", TRIGGER]
    found = certificate(run_small("a", *more, requests=CLASS))
    numbers, cost = found["measurements"], found["cost"]
    assert numbers["klom/models"] == 3
    assert {name: numbers[f"klom/{name}"] for name in SETS} == pytest.approx(dict.fromkeys(SETS, 0.0), abs=1e-9)
    assert numbers["gap/backdoor"] == 0
    assert numbers["backdoor"] == numbers["reference/backdoor"]
    assert numbers["retain_relearned"] == numbers["reference/retain_relearned"]
    assert (cost["retraining_rounds"], cost["retraining_clients"], cost["stored_bytes"]) == (2, 4, 0)
    assert cost["retraining_bytes"] > 0
    assert cost["retraining_cpu_seconds"] > 0


@pytest.mark.slow
def test_another_seed_is_another_model_and_an_edit_is_seen_beside_it(run_small: RunExperiment) -> None:
    """Going on with what was learned of the class is further from retraining than retrained models from each other."""
    more = ["rounds_per_task=4", "unlearning.klom=4", "unlearning.reference=true", "client.epochs=3"]
    request = "{id: two, scope: class, classes: [2], at: {round: 4}}"
    numbers = certificate(run_small("a", *more, requests=request))["measurements"]
    assert numbers["klom/forget_train"] > 0
    assert numbers["klom/forget_train_floor"] > 0
    assert numbers["klom/forget_train"] > numbers["klom/forget_train_floor"]


@pytest.mark.slow
def test_the_likelihood_ratio_is_fitted_to_models_of_other_seeds(run_small: RunExperiment) -> None:
    """A model that was trained all over is attacked as well, which one that is its own reference cannot be."""
    more = ["unlearner=retrain", "unlearning.references=3", "unlearning.reference=true"]
    folder = run_small("a", *more, requests=CLASS)
    numbers = certificate(folder)["measurements"]
    for prefix in ("", "original/", "reference/"):
        assert numbers[f"{prefix}lira_references"] == 3
    assert numbers["lira_auc"] == numbers["reference/lira_auc"] != 0.5
    assert numbers["gap/lira_auc"] == 0
    assert "klom/models" not in numbers


@pytest.mark.slow
def test_what_a_history_takes_is_on_the_certificate(run_small: RunExperiment) -> None:
    request = "{id: bob, scope: client, clients: [2], at: {round: 2}}"
    found = certificate(run_small("a", "unlearner=federaser", requests=request))
    assert found["cost"]["stored_bytes"] >= found["measurements"]["unlearner/stored_bytes"] > 0
    assert "retraining_rounds" not in found["cost"]  # nothing was trained to compare with


@pytest.mark.slow
def test_a_run_that_is_over_can_be_asked_for_more(finished: Path) -> None:
    """An earlier request was served in another process: the other seeds' runs cannot be had, the trigger can."""
    arguments = ["--class", "2", "--quiet", "--unlearner", "ssd", "unlearning.reference=true", "unlearning.klom=2"]
    assert main(["forget", str(finished), *arguments, TRIGGER]) == 0
    content = json.loads(next((finished / "certificates").glob("0002-*.json")).read_text())
    assert {"backdoor", "recovery", "reference/backdoor"} <= content["measurements"].keys()
    assert not any(name.startswith("klom/") for name in content["measurements"])
