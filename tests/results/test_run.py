from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import fedcl.results
from fedcl.results.caveats import caveats
from fedcl.results.recorder import Recorder
from fedcl.results.run import accuracy_matrix
from fedcl.results.summary import summary

MakeRun = Callable[..., Path]


def test_a_finished_and_an_unfinished_run_read_the_same(make_run: MakeRun) -> None:
    done = fedcl.results.load(make_run("done"))
    running = fedcl.results.load(make_run("running", finish=False))
    pd.testing.assert_frame_equal(done.metrics, running.metrics)
    pd.testing.assert_frame_equal(done.timings, running.timings)
    assert (done.status, running.status) == ("done", "running")
    assert running.summary == {}
    assert done.headline()["bwt"] == running.headline()["bwt"]
    assert done.summary["unlearning/forget_accuracy"] == 0.11
    assert done.config["learner"] == {"_target_": "clients.learners.sgd.Sgd"}
    assert done.overrides == ["seed=3"]
    assert done.env["device"] == "cpu"
    assert done.reference is None


def test_a_torn_last_line_is_left_out(make_run: MakeRun) -> None:
    path = make_run(finish=False)
    rows = len(fedcl.results.load(path).metrics)
    with (path / "metrics.jsonl").open("a") as file:
        file.write('{"round":99,"virtual_')
    assert len(fedcl.results.load(path).metrics) == rows


def test_accuracy_matrix_takes_the_last_global_test_value_of_each_task_end(tmp_path: Path) -> None:
    with Recorder(tmp_path) as recorder:
        where = {"phase": "test", "name": "accuracy", "virtual_time": 0.0}
        recorder.row(round=-1, task=0, after=-1, value=0.11, **where)
        recorder.row(round=-1, task=1, after=-1, value=0.12, **where)
        recorder.row(round=0, task=0, after=0, value=0.5, **where)
        recorder.row(round=1, task=0, after=0, value=0.6, **where)
        recorder.row(round=2, task=0, after=1, value=0.4, **where)
        recorder.row(round=2, task=1, after=1, value=0.7, **where)
        recorder.row(round=2, task=0, after=1, value=0.99, client="c1", **where)
        recorder.row(round=2, task=0, after=1, value=0.98, phase="personal", name="accuracy", virtual_time=0.0)
        recorder.row(round=2, task=0, after=1, value=0.97, phase="test", name="loss", virtual_time=0.0)
        recorder.row(round=2, task=-1, after=1, value=0.96, **where)
    run = fedcl.results.load(tmp_path)
    np.testing.assert_array_equal(run.accuracy_matrix().to_numpy(), [[0.6, np.nan], [0.4, 0.7]])
    np.testing.assert_array_equal(accuracy_matrix(run.metrics), run.accuracy_matrix())
    np.testing.assert_array_equal(run.baseline(), [0.11, 0.12])
    np.testing.assert_allclose(run.forgetting(), [0.2])


def test_a_run_under_way_is_judged_by_the_tasks_it_has_reached(tmp_path: Path) -> None:
    with Recorder(tmp_path) as recorder:
        for after, values in enumerate([[0.9, 0.2, 0.1], [0.6, 0.8, 0.1]]):
            for task, value in enumerate(values):
                recorder.row(
                    round=after, phase="test", name="accuracy", value=value, task=task, after=after, virtual_time=0.0
                )
    run = fedcl.results.load(tmp_path)
    assert run.accuracy_matrix().shape == (3, 3)
    assert run.headline()["accuracy/average"] == pytest.approx(0.7)
    assert run.headline()["forgetting/chaudhry"] == pytest.approx(0.3)
    np.testing.assert_allclose(run.forgetting("first"), [0.3])


def test_a_run_without_evaluation_is_empty_but_readable(tmp_path: Path) -> None:
    with Recorder(tmp_path) as recorder:
        recorder.event("fault", round=0, virtual_time=0.0)
    run = fedcl.results.load(tmp_path)
    assert run.accuracy_matrix().empty
    assert run.baseline() is None
    assert run.headline() == {}
    assert run.forgetting().empty
    assert run.by_client() == {}
    assert run.status == "unknown"


def test_by_client_is_the_mean_over_tasks_of_each_clients_latest_round(tmp_path: Path) -> None:
    with Recorder(tmp_path) as recorder:
        for client, server_round, task, value in [
            ("a", 0, 0, 0.1), ("a", 3, 0, 0.4), ("a", 3, 1, 0.6), ("b", 1, 0, 0.9),
        ]:  # fmt: skip
            where = {"client": client, "task": task, "virtual_time": 0.0}
            for phase in ("personal", "trained"):
                recorder.row(round=server_round, phase=phase, name="accuracy", value=value, **where)
        recorder.row(round=9, phase="personal", name="accuracy", value=0.0, virtual_time=0.0)
    run = fedcl.results.load(tmp_path)
    assert run.by_client("trained") == pytest.approx({"a": 0.5, "b": 0.9})
    # all clients are tested together: one that has left by then has no value, least of all its last one
    assert run.by_client() == pytest.approx({"a": 0.5})


def test_a_lost_evaluation_is_missing_and_no_earlier_one_stands_in(tmp_path: Path) -> None:
    with Recorder(tmp_path) as recorder:
        for server_round in (1, 3):
            for client in "abc" if server_round == 1 else "ab":
                for task in (0, 1)[: server_round // 2 + 1]:
                    value = 0.1 * server_round + 0.05 * task
                    where = {"client": client, "task": task, "after": server_round // 2, "virtual_time": 1.0}
                    recorder.row(round=server_round, phase="personal", name="accuracy", value=value, **where)
        lost = {"round": 3, "virtual_time": 4.0, "message": "evaluate", "reason": "gone"}
        recorder.event("client_failed", client="b", **lost)  # of one task; of the other it was heard
        recorder.event("reply_rejected", client="c", **lost)
        recorder.event("client_failed", client="a", **(lost | {"message": "train"}))
    run = fedcl.results.load(tmp_path)
    assert run.by_client() == pytest.approx({"a": 0.325})
    assert run.unheard() == {"b", "c"}
    numbers = summary(tmp_path, 0, 0)
    assert numbers["personal/accuracy_mean"] == pytest.approx(0.325)
    assert numbers["clients_unheard"] == 2.0
    assert numbers["personal/forgetting_mean"] == pytest.approx(0.1 - 0.3)
    assert any("leaves out 2 clients whose last evaluation was lost: b, c" in text for text in caveats(run))


def test_events_have_their_common_fields_first(make_run: MakeRun) -> None:
    events = fedcl.results.load(make_run()).events
    assert list(events.columns[:3]) == ["round", "virtual_time", "kind"]
    assert events["kind"].tolist() == ["task_started", "rejected", "rejected"]
    assert events["client"].tolist()[1:] == ["c4", "c5"]


def test_the_reference_run_is_read_with_it(make_run: MakeRun) -> None:
    path = make_run("run", decay=0.5)
    make_run("run/reference", decay=0.9)
    reference = fedcl.results.load(path).reference
    assert reference is not None
    assert reference.path == path / "reference"


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="must be a run's folder"):
        fedcl.results.load(tmp_path)
    with pytest.raises(ValueError, match="must be a run's folder"):
        fedcl.results.load(tmp_path / "missing")


def test_the_package_is_light_and_load_stays_a_function_whatever_is_imported_first() -> None:
    code = (
        "import sys, fedcl.results\n"
        "assert not {'pandas', 'matplotlib', 'pyarrow', 'rich', 'torch'} & set(sys.modules)\n"
        "import fedcl.results.run, fedcl.results.report\n"
        "assert callable(fedcl.results.load)\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])
    with pytest.raises(AttributeError, match="no attribute 'lode'"):
        fedcl.results.lode  # noqa: B018
