"""Runs whose numbers would mislead: what is said before, in and after them, as a user meets it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from fedcl.cli import main
from fedcl.config.compose import compose
from fedcl.config.value_rules import ConfigError
from fedcl.evaluation.evaluator import Evaluator
from fedcl.evaluation.predictions import score
from fedcl.models.flat import FlatModel
from fedcl.results import load
from fedcl.results.caveats import caveats
from fedcl.results.target import TargetAccuracy
from fedcl.runs.cautions import cautions, constant_accuracy, right_columns
from fedcl.runs.setup import Setup
from fedcl.server.exchange import Fault
from fedcl.server.measurement import Measurement
from fedcl.server.rounds import Arrival, shared_reason
from fedcl.server.validation import Diverged

RunExperiment = Callable[..., Path]
SMALL = ["backend=inline", "compare_with=null", "figures=false", "num_clients=4", "strategy/projection=none"]

right_columns.__test__ = False  # type: ignore[attr-defined]


def warned(cfg: Any, setup: Setup) -> list[str]:
    return cautions(cfg, setup.stream, right_columns(setup))


def prepare(*overrides: str) -> tuple[dict[str, Any], Setup]:
    cfg = compose([*SMALL, "rounds_per_task=1", *overrides])
    return cfg, Setup.of(cfg)


def test_a_task_without_samples_is_told_before_and_after_and_its_empty_rounds_are_counted(
    run_experiment: RunExperiment, capsys: pytest.CaptureFixture[str]
) -> None:
    stream = ["scenario=class_incremental", "scenario.num_tasks=3", "scenario.increments=[5,5,0]"]
    folder = run_experiment("empty", *SMALL, *stream, "rounds_per_task=2")
    run = load(folder)
    last = run.accuracy_matrix().to_numpy()[2, :2]
    assert run.summary["accuracy/average"] == pytest.approx(last.mean())
    assert run.summary["bwt"] == pytest.approx((last - np.diag(run.accuracy_matrix())[:2]).mean())
    assert (run.summary["tasks_untested"], run.summary["rounds_mostly_empty"]) == (1.0, 2.0)
    told = caveats(run)
    assert told[0] == ("task 2 has no test samples: accuracy, forgetting and transfer are means over the 2 other tasks")
    assert "in 2 of 6 rounds most of the clients that were asked hold no samples of their task" in told[-1]
    assert main(["report", str(folder)]) == 0
    assert f"note: {told[0]}" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("stream", "said"),
    [
        (
            ["scenario=task_incremental", "scenario.num_tasks=10"],
            "in tasks 0, 1, 2, 3, 4, 5, 6, 7 and 2 more there is one class to choose: a model that always gives the "
            "same answer scores 100 %, before it has learned anything too; give tasks two classes or more",
        ),
        (
            ["scenario=task_incremental", "scenario.num_tasks=3", "scenario.increments=[1,4,5]"],
            "in task 0 there is one class to choose: a model that always gives the same answer scores 100 %, before it "
            "has learned anything too; give tasks two classes or more",
        ),
        (
            ["scenario=class_incremental", "scenario.num_tasks=10"],
            "after task 0 one class has been seen, which is all a model may answer: it scores 100 % on it whatever",
        ),
        (["scenario=task_incremental", "scenario.num_tasks=5"], None),
        (["scenario=class_incremental", "scenario.num_tasks=5"], None),
        (["scenario=domain_rotated"], None),
    ],
)
def test_tasks_that_one_constant_answer_gets_right_are_told(stream: list[str], said: str | None) -> None:
    assert warned(*prepare(*stream)) == ([] if said is None else [said])


@pytest.mark.parametrize("scenario", ["class_incremental", "domain_rotated"])
def test_test_samples_of_one_class_are_told_in_every_kind_of_stream(scenario: str) -> None:
    cfg, setup = prepare(f"scenario={scenario}")
    half = setup.dataset.test
    only = replace(setup.dataset, test=replace(half, y=np.full_like(half.y, 3)))
    told = warned(cfg, replace(setup, dataset=only))
    assert any(
        "all test samples are of one class: a model that always gives the same answer scores 100 %" in t for t in told
    )
    assert constant_accuracy(setup.stream, right_columns(replace(setup, dataset=only))) == 1.0


def test_the_best_constant_answer_by_hand() -> None:
    def choices(*masks: tuple[int, ...] | None) -> Any:
        def test_task(task: int, after: Any) -> Any:
            return SimpleNamespace(mask=masks[task])

        return SimpleNamespace(num_tasks=len(masks), heads=(4,), test_task=test_task)

    rights = [np.array([0, 0, 0, 1]), np.array([1, 1, 2, 3]), np.array([], np.int64)]
    # one answer for both: class 0 has 3/4 and 0, class 1 has 1/4 and 2/4; the third task has no samples
    assert constant_accuracy(choices(None, None, None), rights) == pytest.approx(3 / 4 / 2)
    # an answer for each, where the task is known
    assert constant_accuracy(choices((0, 1), (1, 2, 3), (3,)), rights) == pytest.approx((3 / 4 + 2 / 4) / 2)
    assert np.isnan(constant_accuracy(choices((0,)), [np.array([], np.int64)]))


def test_two_buffers_are_told_and_one_learner_twice_is_refused() -> None:
    assert warned(*prepare("learner=[er,derpp]")) == [
        "learner=er+derpp: each keeps a buffer of its own (er 200 samples, derpp 200 samples); a client holds and "
        "replays them all"
    ]
    assert warned(*prepare("learner=[er,derpp]", "learner.er.budget=0")) == []
    assert warned(*prepare("learner=[er,ewc]")) == []
    with pytest.raises(ConfigError, match=r"^learner=\[er,er\]: names er twice"):
        compose(["learner=[er,er]"])


def test_training_that_diverges_ends_in_one_line_again_after_a_resume(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "diverged"
    words = [*SMALL, "rounds_per_task=2", "client.optimizer.lr=1e38", f"run_dir={folder}"]
    for command in (["run", "--quiet", *words], ["resume", "--quiet", str(folder)]):
        assert main(command) == 1
        [line] = capsys.readouterr().err.splitlines()
        assert line.startswith("fedcl: error: round ")
        assert ": the loss or weights of 4 of 4 clients are nan; lower client.optimizer.lr; " in line
        assert f"{folder}/events.jsonl" in line
        assert (folder / "STATUS").read_text() == "failed\n"
    assert main(["report", str(folder)]) == 0


def test_the_reason_that_most_clients_share() -> None:
    def shared(*reasons: Diverged | str, clients: int) -> str:
        flight: Any = None  # nothing is read from it
        faults = [
            Fault("client_failed", reason) if isinstance(reason, str) else Fault("reply_rejected", "said so", reason)
            for reason in reasons
        ]
        arrivals = [Arrival(flight, fault=fault) for fault in faults]
        return shared_reason(arrivals + [Arrival(flight)] * (clients - len(arrivals)))

    nan = [Diverged("loss", math.nan)] * 3
    assert shared(*nan, clients=4) == "the loss of 3 of 4 clients is nan; lower client.optimizer.lr"
    weights = Diverged("weights", math.nan), Diverged("weights", math.inf)
    assert shared(*weights, clients=2) == "the weights of 2 of 2 clients are nan; lower client.optimizer.lr"
    infinite = Diverged("loss", math.inf)
    assert shared(infinite, clients=1) == "the loss of 1 of 1 clients is infinite; lower client.optimizer.lr"
    both = Diverged("loss", 2e38), Diverged("weights", 3e38)
    assert shared(*both, clients=3) == "the loss or weights of 2 of 3 clients are too large; lower client.optimizer.lr"
    mixed = shared(*nan, "no reply in time", clients=10)
    assert mixed.endswith("lower client.optimizer.lr, and 1 other reason(s)")
    alike = shared("ValueError: 3 rows", "ValueError: 4 rows", "RuntimeError: gone", clients=3)
    assert alike == "2 of 3 clients: ValueError: 3 rows, and 1 other reason(s)"
    assert shared(clients=2) == "none of 2 clients failed"


def test_an_output_that_is_no_number_is_never_right() -> None:
    nan, inf = float("nan"), float("inf")
    logits = torch.tensor([[0.0, 1.0], [nan, 1.0], [nan, nan], [inf, 0.0], [-inf, 1.0]])
    right, defined = score(lambda rows: logits[rows], torch.arange(5), torch.tensor([1, 0, 0, 0, 1]))
    assert right.tolist() == [True, False, False, False, True]
    assert defined.tolist() == [True, False, False, False, True]


class Diary:
    """Takes down what a measurement records."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self.events: list[dict[str, Any]] = []

    def row(self, **row: Any) -> None:
        self.rows.append(row)

    def event(self, kind: str, **fields: Any) -> None:
        self.events.append({"kind": kind, **fields})

    def timing(self, round: int, name: str, seconds: float) -> None:
        raise AssertionError(name)


def test_a_model_with_finite_weights_and_outputs_that_are_none_does_not_look_like_chance() -> None:
    cfg, setup = prepare("scenario=class_incremental", "scenario.num_tasks=2")
    from fedcl import assembly

    model: FlatModel = assembly.make_model(cfg, setup.dataset, setup.stream, torch.device("cpu"))
    initial, diary = model.vector().clone(), Diary()
    measurement = Measurement(diary, setup.stream, Evaluator(setup.dataset, setup.stream, model))
    stage = setup.schedule.stage(1)
    assert stage.ends
    measurement.test(torch.full_like(initial, 1e30), 1, 5.0, stage, [0, 1])
    assert [row["value"] for row in diary.rows] == [0.0, 0.0]
    samples = {str(task): len(right) for task, right in enumerate(right_columns(setup))}
    assert diary.events == [{"kind": "test_undefined", "round": 1, "virtual_time": 5.0, "samples": samples}]
    measurement.test(initial, 1, 5.0, stage, [0, 1])
    assert len(diary.events) == 1
    assert measurement.headline.startswith("accuracy 0.")
    plain = measurement.headline
    measurement.edited()
    measurement.edited()
    assert measurement.headline == f"{plain} before the last request"
    measurement.test(initial, 1, 5.0, stage, [0, 1])
    assert measurement.headline == f"{plain} after the last request"


def test_a_target_is_the_mean_over_tasks_that_can_be_tested() -> None:
    row = {"phase": "test", "name": "accuracy", "client": "", "after": 2, "round": 7}
    target = TargetAccuracy(0.5, 3, [0, 1])
    target.follow({**row, "task": 0, "value": 0.4})
    assert target.reached(7) is None
    target.follow({**row, "task": 1, "value": 0.7})
    assert target.reached(7) == pytest.approx(0.55)
    assert TargetAccuracy(0.5, 3, []).reached(-1) is None
