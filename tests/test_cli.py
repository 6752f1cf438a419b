from __future__ import annotations

import os
import signal
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path

import pytest

from fedcl import __version__, cli
from fedcl.config.value_rules import ConfigError
from fedcl.results.launches import Trust
from fedcl.runs import two_phase  # noqa: F401 - imported now it holds the real run, later it might keep the one put in its place below

ROOT = Path(__file__).resolve().parents[1]


def fedcl(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "fedcl", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=env, cwd=cwd, check=False, timeout=60)


def test_help_shows_the_commands(tmp_path: Path) -> None:
    done = fedcl("--help", cwd=tmp_path)
    assert done.returncode == 0
    assert all(word in done.stdout for word in ("run", "resume", "report", "list", "examples:"))
    assert "learner=[ewc,er]" in fedcl("run", "--help", cwd=tmp_path).stdout
    assert fedcl("--version", cwd=tmp_path).stdout == f"fedcl {__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "nosuchkey=1"], "fedcl: error: nosuchkey=1: no such key"),
        (["run", "backend=rey"], "fedcl: error: backend=rey: no such choice; available: flower, inline, ray"),
        (["run", "--config-dir", "absent"], "absent: no such folder"),
        (["resume", "absent"], "fedcl: error: absent: not a run's folder"),
        (["report", "."], "fedcl: error: .: not a run's folder"),
        (["list", "backends"], "fedcl: error: backends: no such kind; did you mean backend"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(tmp_path: Path, arguments: list[str], message: str) -> None:
    done = fedcl(*arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""
    assert list(tmp_path.iterdir()) == []


def test_output_that_nobody_reads_is_no_failure_to_tell_of(tmp_path: Path) -> None:
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "fedcl", "list", "learner"]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    try:
        done = subprocess.run(
            command, cwd=tmp_path, env=env, stdout=write, stderr=subprocess.PIPE, text=True, check=False
        )
    finally:
        os.close(write)
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.parametrize("arguments", [[], ["fly"], ["run", "--quite"], ["report"], ["list", "a", "b"]])
def test_a_wrong_command_line_is_bad_input(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(arguments) == 2
    assert "usage: fedcl" in capsys.readouterr().err


def test_list_names_kinds_and_choices(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["list"]) == 0
    assert "flower, inline, ray" in capsys.readouterr().out
    assert cli.main(["list", "backend"]) == 0
    first, *_ = capsys.readouterr().out.splitlines()
    assert first.split(maxsplit=1)[0] == "flower"
    assert "SuperLink" in first


CFG: dict[str, object] = {"seed": 1, "protocol": {"name": "none"}}


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[..., object]], None]:
    """Put a run of one's own where the real one would be wired: these tests are of `main` alone."""

    def put(run: Callable[..., object]) -> None:
        module = types.ModuleType("fedcl.runs.experiment")
        module.run = module.resume = run  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "fedcl.runs.experiment", module)
        monkeypatch.setattr("fedcl.runs.experiment", module, raising=False)
        monkeypatch.setattr(
            "fedcl.config.compose.compose", lambda overrides, dirs: CFG | {"overrides": list(overrides)}
        )

    return put


def test_the_folder_is_the_last_line(
    command: Callable[..., None], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    seen: list[object] = []

    def run(cfg: dict[str, object], overrides: list[str], config_dirs: list[Path], quiet: bool) -> Path:
        seen.extend([cfg, overrides, config_dirs, quiet])
        print("progress")
        return tmp_path / "r"

    command(run)
    assert cli.main(["run", "seed=1", "--quiet", "--config-dir", str(tmp_path), "num_clients=3"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == str(tmp_path / "r")
    overrides = ["seed=1", "num_clients=3"]
    assert seen == [CFG | {"overrides": overrides}, overrides, [tmp_path], True]
    assert str(tmp_path) in sys.path
    assert sys.path.index(str(tmp_path)) > 0


def test_resume_passes_its_options(command: Callable[..., None], tmp_path: Path) -> None:
    seen: list[object] = []

    def resume(run_dir: Path, force: bool, quiet: bool, *, trust: Trust) -> Path:
        seen.extend([run_dir, force, quiet, trust])
        return run_dir

    command(resume)
    (tmp_path / "config.yaml").touch()
    assert cli.main(["resume", str(tmp_path), "--force", "--trust", "--config-dir", "my"]) == 0
    assert seen == [tmp_path, True, False, Trust((Path("my"),), everything=True)]


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (ConfigError("a=1:\n must be 2"), 2, "fedcl: error: a=1: must be 2\n"),
        (RuntimeError("deep down"), 1, "RuntimeError: deep down"),
        (ValueError("not the user's"), 1, "Traceback"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (SystemExit(143), 143, ""),
        (ModuleNotFoundError("No module named 'pandas'", name="pandas.core"), 1, "pip install 'fedcl[sim]'"),
        (ModuleNotFoundError("No module named 'x'", name="x"), 1, "Traceback"),
    ],
)
def test_exit_status(
    command: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
    error: BaseException,
    status: int,
    message: str,
) -> None:
    def run(*_: object) -> Path:
        raise error

    command(run)
    assert cli.main(["run"]) == status
    assert message in capsys.readouterr().err


def test_sigterm_unwinds_the_run_and_is_given_back(command: Callable[..., None]) -> None:
    closed: list[bool] = []

    def run(*_: object) -> Path:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            signal.pause()
        finally:
            closed.append(True)
        raise AssertionError("the signal did not arrive")

    before = signal.getsignal(signal.SIGTERM)
    command(run)
    assert cli.main(["run"]) == 143
    assert closed == [True]
    assert signal.getsignal(signal.SIGTERM) is before
