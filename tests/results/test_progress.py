from __future__ import annotations

import importlib.util
import io

import pytest

from fedcl.results.progress import Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def follow(progress: Progress, rounds: int, tasks: int) -> None:
    with progress:
        for server_round in range(1, rounds + 1):
            task = (server_round - 1) * tasks // rounds
            progress.update(server_round, rounds, task, f"accuracy {server_round / rounds:.3f}")


def test_without_a_terminal_there_is_about_one_line_a_tenth() -> None:
    out = io.StringIO()
    follow(Progress(stream=out), 200, 1)
    lines = out.getvalue().splitlines()
    assert len(lines) == 11
    assert lines[0].startswith("round 1/200  task 0  accuracy 0.005  ")
    assert lines[-1].startswith("round 200/200  task 0  accuracy 1.000  ")
    assert lines[-2].endswith(" left")
    assert lines[-1].endswith(" elapsed")


def test_without_a_terminal_each_task_has_a_line() -> None:
    out = io.StringIO()
    follow(Progress(stream=out), 300, 30)
    lines = out.getvalue().splitlines()
    assert {line.split()[3] for line in lines} == {str(task) for task in range(30)}
    assert len(lines) <= 41


def test_on_a_terminal_a_bar_shows_round_task_and_text() -> None:
    out = Terminal()
    with Progress(stream=out) as progress:
        progress.update(1, 4, 0, "accuracy [0.5]")
        progress.print("client [c3] was rejected")
        progress.update(4, 4, 1, "accuracy [0.75]")
    shown = out.getvalue()
    for text in ("4/4", "task 1", "accuracy [0.75]", "client [c3] was rejected"):
        assert text in shown


def test_without_rich_a_terminal_gets_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "rich" else find(name))
    out = Terminal()
    follow(Progress(stream=out), 2, 1)
    assert [line.split()[1] for line in out.getvalue().splitlines()] == ["1/2", "2/2"]
    assert "\x1b" not in out.getvalue()


def test_quiet_writes_nothing() -> None:
    for out in (io.StringIO(), Terminal()):
        progress = Progress(quiet=True, stream=out)
        follow(progress, 10, 2)
        progress.print("a line")
        assert out.getvalue() == ""


def test_a_resumed_run_estimates_from_where_it_started(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    out = io.StringIO()
    with Progress(stream=out) as progress:
        for server_round in (51, 60):
            now[0] = 100.0 + 2.0 * (server_round - 50)
            progress.update(server_round, 100, 0)
    assert [line.rpartition("  ")[2] for line in out.getvalue().splitlines()] == ["1:38 left", "1:20 left"]
