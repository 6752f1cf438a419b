"""One folder, one process: shown with processes of their own, killed or not."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fedcl.cli import main
from fedcl.config.value_rules import ConfigError
from fedcl.results import load, locking
from fedcl.results.locking import Held, hold

SMALL = ["compare_with=null", "figures=false", "num_clients=3", "scenario.num_tasks=2", "rounds_per_task=2"]
SMALL += ["strategy/projection=none", "checkpoint.min_seconds=0", "unlearner=continue_without"]
SMALL += ["unlearning.reference=false", "scenario=class_incremental"]
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="there are no such locks")

HOLD = """
import sys, time
from pathlib import Path
from fedcl.results.locking import hold
with hold(Path(sys.argv[1])):
    {then}
    print("held", flush=True)
    time.sleep(600)
"""
# a run that waits in its second round until there is a file, so that a test meets it at work
GATED = """
import sys, time
from pathlib import Path
from fedcl.server.loop import Server
aggregate, gate = Server._aggregate, Path(sys.argv[1])

def waiting(self, server_round, arrived):
    if server_round == 1:
        gate.with_suffix(".reached").touch()
        while not gate.exists():
            time.sleep(0.05)
    aggregate(self, server_round, arrived)

Server._aggregate = waiting
from fedcl.cli import main
sys.exit(main(sys.argv[2:]))
"""


@pytest.fixture
def started(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Return a function that starts Python; what is left of it is ended by id."""
    running: list[subprocess.Popen[str]] = []

    def start(*arguments: object) -> subprocess.Popen[str]:
        command = [sys.executable, *map(str, arguments)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        running.append(process)
        return process

    yield start
    for process in running:
        process.kill()
        process.communicate()


def _wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 240
    while not path.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline()


def test_a_held_folder_says_who_holds_it(tmp_path: Path, started: Callable[..., subprocess.Popen[str]]) -> None:
    holder = started("-c", HOLD.format(then="pass"), tmp_path)
    assert _line(holder) == "held\n"
    with (
        pytest.raises(Held, match=rf"-c .* \(process {holder.pid} on .*, since 20.*\) is at work there"),
        hold(tmp_path),
    ):
        raise AssertionError("held twice")
    holder.kill()
    holder.communicate()
    assert json.loads((tmp_path / locking.FILE).read_text())["pid"] == holder.pid  # nobody could clear it
    with hold(tmp_path, "now"):
        assert "now (process" in locking.holder(tmp_path)
    assert (tmp_path / locking.FILE).read_text() == ""


@pytest.mark.parametrize(
    "then",
    [
        "import subprocess; child = subprocess.Popen(['sleep', '600'], close_fds=False); pid = child.pid",
        "import os; pid = os.fork(); pid or time.sleep(600)",
        "import multiprocessing as m; c = m.get_context('fork').Process(target=time.sleep, args=(600,)); c.start(); "
        "pid = c.pid",
    ],
    ids=["exec", "fork", "multiprocessing"],
)
def test_a_child_that_outlives_the_holder_holds_nothing(
    then: str, tmp_path: Path, started: Callable[..., subprocess.Popen[str]]
) -> None:
    holder = started("-c", HOLD.format(then=f"{then}; print(pid, flush=True)"), tmp_path)
    child = int(_line(holder))
    try:
        assert _line(holder) == "held\n"
        holder.kill()
        holder.wait()
        with hold(tmp_path, wait=True):  # a child that was just forked lets go as soon as it has its first turn
            os.kill(child, 0)  # it lives, and is in nobody's way
    finally:
        os.kill(child, signal.SIGKILL)


@pytest.mark.parametrize("change", ["unlink", "replace"])
def test_who_removes_the_locks_file_does_not_get_in(change: str, tmp_path: Path) -> None:
    with hold(tmp_path):
        (tmp_path / locking.FILE).unlink()
        if change == "replace":
            (tmp_path / locking.FILE).write_text("mine")
        with pytest.raises(Held, match="another process is at work there"), hold(tmp_path):
            raise AssertionError("held twice")


@pytest.mark.parametrize("place", ["folder", "link", "fifo"])
def test_something_else_in_the_locks_place_is_named(place: str, tmp_path: Path) -> None:
    file, outside = tmp_path / locking.FILE, tmp_path / "outside"
    outside.write_text("mine")
    if place == "folder":
        file.mkdir()
    elif place == "link":
        file.symlink_to(outside)
    else:
        os.mkfifo(file)
    with pytest.raises(ConfigError, match=r"\.lock: .*remove it"), hold(tmp_path):
        raise AssertionError("held")
    assert outside.read_text() == "mine"


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"pid": "x"}', "\x1b[31m", '{"pid":1,"host":"\\u001b[2J","command":"a']
)
def test_what_stands_in_the_locks_file_is_data(text: str, tmp_path: Path) -> None:
    with hold(tmp_path):
        (tmp_path / locking.FILE).write_text(text)
        with pytest.raises(Held) as caught, hold(tmp_path):
            raise AssertionError("held twice")
    assert "\x1b" not in str(caught.value)


def test_a_file_system_without_locks_keeps_nobody_out_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import errno

    def none(descriptor: int, how: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(locking.fcntl, "flock", none)
    with hold(tmp_path):
        pass
    assert capsys.readouterr().err.count("its file system has no locks") == 1


def test_beside_a_living_run_nobody_else_writes_and_everybody_reads(
    tmp_path: Path, started: Callable[..., subprocess.Popen[str]], capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("fedcl.results.html.page.draw_all", lambda run: ([], {}))  # pictures take longer than the rest
    gate, folder = tmp_path / "gate", tmp_path / "run"
    run = started("-c", GATED, gate, "run", "--quiet", "backend=inline", *SMALL, f"run_dir={folder}")
    _wait_for(gate.with_suffix(".reached"), run)
    told = rf"{folder}: -c {gate} run"
    for words in (["resume", folder], ["extend", folder, "rounds_per_task=[2,3]"]):
        assert main([str(word) for word in words]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert told in error
        assert f"(process {run.pid} on " in error
    assert main(["run", "--quiet", "backend=inline", *SMALL, f"run_dir={folder}"]) == 2
    assert "must be new or empty" in capsys.readouterr().err
    assert main(["report", str(folder)]) == 0
    assert "(running)" in capsys.readouterr().out
    assert main(["export", str(folder), "--out", str(tmp_path / "model")]) == 0
    assert main(["forget", str(folder), "--client", "2", "--id", "bob"]) == 0  # submitted: no second writer
    assert "bob: submitted, to be processed before the next round" in capsys.readouterr().out
    gate.touch()
    assert run.wait(240) == 0
    served = load(folder).events.query("kind == 'request_served'")
    assert served["round"].tolist() == [2]


def test_a_killed_run_is_held_by_nobody_and_asked_as_one_that_stopped(
    tmp_path: Path, started: Callable[..., subprocess.Popen[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    gate, folder = tmp_path / "gate", tmp_path / "run"
    run = started("-c", GATED, gate, "run", "--quiet", "backend=inline", *SMALL, f"run_dir={folder}")
    _wait_for(gate.with_suffix(".reached"), run)
    run.kill()
    run.communicate()
    assert (folder / "STATUS").read_text() == "running\n"
    assert main(["forget", str(folder), "--client", "2", "--id", "bob"]) == 0
    assert "bob: submitted, to be processed when the run goes on" in capsys.readouterr().out
    both = [started("-c", GATED, gate, "resume", "--quiet", folder) for _ in range(2)]
    deadline = time.monotonic() + 240
    while not [one for one in both if one.poll() is not None]:  # one of them is refused while the other one waits
        assert time.monotonic() < deadline
        time.sleep(0.05)
    [refused] = [one for one in both if one.poll() is not None]
    _, error = refused.communicate()
    assert refused.returncode == 2, error
    assert error.count("\n") == 1
    assert "is at work there; wait for it, or stop it first" in error
    gate.touch()
    [other] = [one for one in both if one is not refused]
    assert other.wait(240) == 0
    run_ = load(folder)
    assert run_.status == "done"
    assert run_.events["kind"].tolist().count("request_served") == 1


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="finds the processes it started through /proc")
def test_a_killed_run_is_resumed_at_once_while_its_workers_still_live(
    tmp_path: Path, started: Callable[..., subprocess.Popen[str]], end_processes: Callable[[str], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("FEDCL_TEST", str(tmp_path))
    gate, folder = tmp_path / "gate", tmp_path / "run"
    settings = [*SMALL, "backend=ray", "backend.workers=2", f"run_dir={folder}"]
    run = started("-c", GATED, gate, "run", "--quiet", *settings)
    _wait_for(gate.with_suffix(".reached"), run)
    run.kill()
    run.wait()  # not for its pipes: its workers hold them
    try:
        with hold(folder):
            pass
        gate.touch()
        again = started("-m", "fedcl", "resume", "--quiet", folder)
        _, error = again.communicate(timeout=240)
        assert again.returncode == 0, error
    finally:
        end_processes(f"FEDCL_TEST={tmp_path}")
    assert load(folder).status == "done"
