from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from fedcl.config.value_rules import ConfigError
from fedcl.results.figures import save_all
from fedcl.results.recorder import Recorder
from fedcl.results.report import event_counts, headline_rows, terminal_report
from fedcl.results.run import load
from fedcl.results.writing import write_launch

MakeRun = Callable[..., Path]


def test_the_report_tells_what_was_run_and_what_came_out(make_run: MakeRun) -> None:
    path = make_run()
    run = load(path)
    files = save_all(run, run.path / "figures")
    text = terminal_report(run)
    assert str(path) in text
    assert "(done)" in text
    assert "changed: seed=3" in text
    assert "learner=Sgd" in text
    assert f"{100 * run.summary['accuracy/average']:.2f} %" in text
    assert "12.35 MB" in text
    assert "events: rejected 2, task_started 1" in text
    assert "figures:" in text
    assert all(file.exists() and file.parent == path / "figures" for file in files)
    for value in run.accuracy_matrix().to_numpy().ravel():
        assert f"{100 * value:.1f}" in text
    assert "\x1b" not in text
    assert "\x1b" in terminal_report(run, color=True)


def test_the_reference_stands_beside_the_run_with_the_difference(make_run: MakeRun) -> None:
    path = make_run("run", decay=0.5)
    make_run("run/reference", decay=0.9)
    run = load(path)
    assert run.reference is not None
    own, other = run.summary["accuracy/average"], run.reference.summary["accuracy/average"]
    row = next(row for row in headline_rows(run) if row[0] == "accuracy/average")
    assert row[1:] == (f"{100 * own:.2f} %", f"{100 * other:.2f} %", f"{100 * (own - other):+.2f} pp")
    assert "reference" in terminal_report(run)


def test_reference_keys_of_the_summary_stand_in_for_a_reference_run(tmp_path: Path) -> None:
    with Recorder(tmp_path) as recorder:
        recorder.write_summary({"accuracy/average": 0.5, "reference/accuracy/average": 0.4, "reference/gap": 0.25})
    assert headline_rows(load(tmp_path)) == [
        ("accuracy/average", "50.00 %", "40.00 %", "+10.00 pp"),
        ("reference/gap", "0.25", "", ""),
    ]


def test_a_run_under_way_and_an_empty_one_have_a_report(make_run: MakeRun, tmp_path: Path) -> None:
    text = terminal_report(load(make_run("running", finish=False)))
    assert "results so far" in text
    assert "(running)" in text
    assert "figures: none drawn" in text
    empty = tmp_path / "empty"
    empty.mkdir()
    Recorder(empty).close()
    text = terminal_report(load(empty))
    assert "no accuracy has been measured yet" in text
    assert "events: none" in text
    assert event_counts(load(empty)) == {}


def test_paths_and_overrides_are_printed_as_they_are(tmp_path: Path) -> None:
    write_launch(tmp_path, "seed: 1\n", ["rounds_per_task=[2,3]", "data.root=/tmp/[bold]"], {})
    assert "changed: rounds_per_task=[2,3]  data.root=/tmp/[bold]" in terminal_report(load(tmp_path), width=200)


@pytest.mark.parametrize("sign", ["\U0001f600", "\u00fc", "\u4e2d"])
def test_any_character_of_an_override_is_written_read_and_shown(sign: str, tmp_path: Path) -> None:
    """Also as versions before wrote it: one beyond the basic plane as two escapes."""
    write_launch(tmp_path, f"name: '{sign}'\n", [f"name={sign}"], {"launch": {"overrides": [f"name={sign}"]}})
    for _ in range(2):
        run = load(tmp_path)
        assert run.overrides == run.env["launch"]["overrides"] == [f"name={sign}"]
        assert f"changed: name={sign}" in terminal_report(run)
        (tmp_path / "SHA256SUMS").unlink(missing_ok=True)
        (tmp_path / "overrides.yaml").write_text(f"- {json.dumps(f'name={sign}')}\n")
        (tmp_path / "env.json").write_text(json.dumps(run.env))


def test_half_a_character_is_damage(tmp_path: Path) -> None:
    write_launch(tmp_path, "name: a\n", ["name=a"], {})
    (tmp_path / "SHA256SUMS").unlink()
    (tmp_path / "overrides.yaml").write_text('- "name=\\ud83d"\n')
    with pytest.raises(ConfigError, match=r"overrides\.yaml: damaged"):
        load(tmp_path)


def test_many_tasks_are_pointed_to_instead_of_printed(make_run: MakeRun) -> None:
    text = terminal_report(load(make_run(num_tasks=15, rounds_per_task=1)))
    assert "accuracy of 15 tasks" in text
    assert max(map(len, text.splitlines())) <= 100
