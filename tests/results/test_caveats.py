"""Numbers of a run that say something else than they seem to, and the sentences that go with them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedcl.results import figures, html, load
from fedcl.results.caveats import caveats
from fedcl.results.recorder import Recorder
from fedcl.results.report import terminal_report
from fedcl.results.summary import summary
from fedcl.results.writing import write_launch

# after task (row), on task (column): the last task has no test samples, yet all is tested after it
ACCURACY = [[0.8, 0.75], [0.9, 0.6], [0.5, 0.7]]


def record(recorder: Recorder, events: Any = (), **partition: Any) -> None:
    """Write a run of three tasks of two rounds each; ``events`` are (kind, round, fields)."""
    noted = {"tasks": [[0], [1], [2]], "test_samples": [30, 10, 0], "constant_accuracy": 0.5, **partition}
    recorder.event("partition", round=-1, virtual_time=0.0, **noted)
    for task, (value, samples) in enumerate(((0.1, 30), (0.2, 10))):
        for name, number in (("accuracy", value), ("num_test_examples", samples)):
            recorder.row(round=-1, phase="test", name=name, value=number, task=task, virtual_time=0.0)
    for after, values in enumerate(ACCURACY):
        for server_round in (2 * after, 2 * after + 1):
            when = {"round": server_round, "virtual_time": server_round + 1.0, "after": after}
            recorder.row(phase="train", name="num_examples", value=5, client="a", task=after, **when)
            for task, value in enumerate(values if server_round % 2 else ()):
                recorder.row(phase="test", name="accuracy", value=value, task=task, **when)
    for kind, server_round, fields in events:
        recorder.event(kind, round=server_round, virtual_time=server_round + 1.0, **fields)


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    with Recorder(tmp_path) as recorder:
        record(recorder, [("warning", -1, {"text": "task 2 has <no> test samples"})])
        recorder.status("done")
    recorder.write_summary(summary(tmp_path, 1, 2))
    return tmp_path


def test_a_last_task_without_test_samples_does_not_take_the_run_back_by_one_task(run_dir: Path) -> None:
    numbers = json.loads((run_dir / "summary.json").read_text())
    expected = {
        "accuracy/average": (0.5 + 0.7) / 2,
        "accuracy/average_incremental": (0.8 + (0.9 + 0.6) / 2 + (0.5 + 0.7) / 2) / 3,
        "accuracy/average_incremental_samples": (0.8 + (27 + 6) / 40 + (15 + 7) / 40) / 3,
        "accuracy/learning": (0.8 + 0.6) / 2,
        "tasks_untested": 1.0,
        "forgetting/chaudhry": ((0.9 - 0.5) + (0.6 - 0.7)) / 2,
        "forgetting/first": ((0.8 - 0.5) + (0.6 - 0.7)) / 2,
        "forgetting/peak": ((0.9 - 0.5) + (0.75 - 0.7)) / 2,
        "bwt": ((0.5 - 0.8) + (0.7 - 0.6)) / 2,
        "fwt": 0.75 - 0.2,
        # since it was learned task 0 was lowest at the end, and task 1, which is an earlier one now, too
        "stability/round/min_accuracy": (0.5 + 0.7) / 2,
    }
    assert {key: numbers[key] for key in expected} == pytest.approx(expected)
    assert numbers["stability/round/worst_case_accuracy"] is None  # how the present task stands is unknown
    np.testing.assert_allclose(load(run_dir).forgetting(), [0.4, -0.1])


def test_what_is_left_out_is_said_on_the_terminal_and_on_the_page(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = load(run_dir)
    assert caveats(run) == ["task 2 has <no> test samples"]
    text = " ".join(terminal_report(run).split())
    assert "note: task 2 has <no> test samples" in text
    assert "tasks_untested │ 1 │" in text
    monkeypatch.setattr("fedcl.results.html.page.draw_all", lambda run: ([], {}))  # pictures are drawn below
    assert '<p class="note">task 2 has &lt;no&gt; test samples</p>' in html.write(run).read_text(encoding="utf-8")
    for name in ("accuracy_matrix", "accuracy_by_task", "forgetting_bars"):
        figure = getattr(figures, name)(run)
        assert "nan" not in str(figure.get_label())


def test_the_headline_says_whether_it_is_from_before_or_after_a_request(tmp_path: Path) -> None:
    with Recorder(tmp_path) as recorder:
        served = [("request_served", 3, {"requests": ["early"]}), ("request_served", 6, {"requests": ["last", "too"]})]
        record(recorder, served)
        for at, name, value in ((2, "h_mean", 0.9), (2, "kl", 0.1), (5, "kl", float("nan")), (5, "revival/last", 0.3)):
            recorder.row(round=at, phase="unlearning", name=name, value=value, virtual_time=at + 1.0)
    told = caveats(load(tmp_path))
    assert told[0].startswith("accuracy, forgetting and transfer are from before requests last, too: ")
    assert told[1] == "the last tests are from after request early (before round 4), earlier ones not"
    numbers = summary(tmp_path, 0, 0)
    assert numbers["unlearning/requests_after_last_test"] == 2.0
    # what the last requests have no measurement of is not that of an earlier one, nor is a value that is missing
    assert "unlearning/h_mean" not in numbers
    assert np.isnan(numbers["unlearning/kl"])
    assert numbers["unlearning/revival/last"] == 0.3


def test_rounds_that_are_mostly_empty_and_tests_that_are_not_finite_are_counted(tmp_path: Path) -> None:
    with Recorder(tmp_path) as recorder:
        empty = [("round_mostly_empty", at, {"clients": 4, "empty": 3}) for at in (1, 1, 4)]
        record(recorder, [*empty, ("test_undefined", 5, {"samples": {"0": 3}})])
    told = caveats(load(tmp_path))
    assert told[0].startswith("after round 6 the global model's outputs were not finite on some test samples")
    assert told[1].startswith("in 2 of 6 rounds most of the clients that were asked hold no samples of their task")
    assert summary(tmp_path, 0, 0)["rounds_mostly_empty"] == 2.0


@pytest.mark.parametrize(("constant", "said"), [(0.6, True), (0.599, False), (1.0, False)])
def test_an_accuracy_that_one_constant_answer_reaches_is_said(tmp_path: Path, constant: float, said: bool) -> None:
    with Recorder(tmp_path) as recorder:
        record(recorder, constant_accuracy=constant)
        recorder.status("done")
    told = caveats(load(tmp_path))
    assert told == ([told[0]] if said else [])
    assert (
        not said or "accuracy/average is 60.00 %, and a model that always gives the same answer has 60.00 %" in told[0]
    )


def test_a_number_that_was_not_measured_is_not_zero(tmp_path: Path) -> None:
    with Recorder(tmp_path) as recorder:
        record(recorder)
    write_launch(tmp_path, "seed: 0\nasync: {buffer: 2, deadline: null}\n", [], {})
    numbers = summary(tmp_path, 0, 0)
    # updates may be late here, and none was counted; and no time was taken
    assert np.isnan([numbers["staleness/mean"], numbers["staleness/max"], numbers["clients_per_second"]]).all()
    synchronous = tmp_path / "synchronous"
    synchronous.mkdir()
    with Recorder(synchronous) as recorder:
        record(recorder)
    write_launch(synchronous, "seed: 0\nasync: {buffer: null, deadline: null}\n", [], {})
    assert summary(synchronous, 0, 0)["staleness/mean"] == 0.0
