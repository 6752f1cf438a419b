"""A run's folder that somebody sends is data: no code comes from it or from where it points without ``--trust``."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from fedcl.cli import main
from fedcl.results import sums

ROOT = Path(__file__).resolve().parents[2]
RUN = ["run", "--quiet", "backend=inline", "figures=false", "compare_with=null", "num_clients=3", "rounds_per_task=1"]
RUN += ["scenario=class_incremental", "scenario.num_tasks=2", "strategy/projection=none", "checkpoint.min_seconds=0"]
CODE = """
from pathlib import Path
Path({mark!r}).touch()
from fedcl.contracts.learner import Plugin

class Own(Plugin):
    pass
"""
COMMANDS = {
    "resume": ["resume"],
    "force": ["resume", "--force"],
    "extend": ["extend", "rounds_per_task=[1,2]"],
    "forget": ["forget", "--client", "1"],
    "export": ["export"],
    "verify": ["verify"],
    "report": ["report"],
    "compare": ["compare"],
}


@pytest.fixture(scope="module")
def played(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a module of its maker's, which lies beside its ``--config-dir``."""
    base = tmp_path_factory.mktemp("maker")
    (base / "my" / "learner").mkdir(parents=True)
    (base / "own_part.py").write_text(CODE.format(mark=str(base / "made")))
    (base / "my" / "learner" / "own.yaml").write_text("# Own.\nown:\n  _target_: own_part.Own\n")
    request = "unlearning.requests=[{id: first, scope: client, clients: [2], at: end}]"
    words = [*RUN, "--config-dir", str(base / "my"), "learner=own", request, f"run_dir={base / 'run'}"]
    done = subprocess.run(
        [sys.executable, "-m", "fedcl", *words], env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False,
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (base / "made").unlink()
    return base


def _fedcl(*words: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "fedcl", *map(str, words)]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)


def _main(*words: object) -> int:
    """Run a command in this process, whose modules and paths stay what they were."""
    paths = list(sys.path)
    try:
        return main([str(word) for word in words])
    finally:
        sys.path[:] = paths
        sys.modules.pop("own_part", None)


def _words(command: str, folder: Path) -> list[str]:
    name, *rest = COMMANDS[command]
    return [name, str(folder), *rest]


@pytest.mark.parametrize("command", [name for name in COMMANDS if name not in ("report", "compare", "verify")])
def test_code_that_only_the_folder_points_to_is_not_imported(
    command: str, played: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(shutil.copytree(played / "run", tmp_path / "run"))
    monkeypatch.chdir(tmp_path)
    assert _main(*_words(command, folder)) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "own_part" in error
    assert str(played) in error  # where it lay
    assert "--config-dir DIR" in error
    assert "--trust" in error
    assert not (played / "made").exists()
    assert not (folder / "requests.jsonl").exists()


@pytest.mark.parametrize("command", ["report", "compare"])
def test_who_only_looks_needs_no_code(
    command: str, played: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedcl.results.html.page.draw_all", lambda run: ([], {}))
    folder = Path(shutil.copytree(played / "run", tmp_path / "run"))
    assert _main(*_words(command, folder)) == 0
    assert not (played / "made").exists()


@pytest.mark.parametrize("how", ["--trust", "--config-dir"])
def test_who_says_so_goes_on_with_own_code(
    how: str, played: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(shutil.copytree(played / "run", tmp_path / "run"))
    monkeypatch.chdir(tmp_path)
    more = [how] if how == "--trust" else [how, played / "my"]
    assert _main("export", folder, *more) == 0
    assert (played / "made").exists()
    (played / "made").unlink()


def test_standing_in_the_folder_imports_nothing_of_it(tmp_path: Path, played: Path) -> None:
    """Neither what its configuration names nor what bears a library's name."""
    folder = Path(shutil.copytree(played / "run", tmp_path / "run"))
    for name in ("own_part", "torch", "yaml", "numpy", "mlflow"):
        (folder / f"{name}.py").write_text(CODE.format(mark=str(tmp_path / f"ran_{name}")))
    done = _fedcl("export", ".", cwd=folder)
    assert done.returncode == 2, done.stderr
    assert "asks for code that is not fedcl's: own_part" in done.stderr
    assert [path.name for path in tmp_path.glob("ran_*")] == []


def _rewrite(folder: Path, change: Callable[[dict[str, object]], None]) -> None:
    """Change a configuration with hashes that fit, as somebody with bad intentions would."""
    cfg = yaml.safe_load((folder / "config.yaml").read_text())
    change(cfg)
    (folder / "config.yaml").write_text(yaml.safe_dump(cfg))
    sums.accept(folder)


@pytest.mark.parametrize(
    ("target", "packages"),
    [
        ("os.system", ["os", "posix"]),
        ("fedcl.cli.os.system", ["posix", "nt"]),
        ("subprocess.run", ["subprocess"]),
        ("__main__.x", ["__main__"]),
        ("json.tool.main", ["json"]),
    ],
)
def test_a_folder_trusts_nobody_in_the_users_name(
    target: str, packages: list[str], played: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(played / "run", tmp_path / "run"))
    _rewrite(folder, lambda cfg: cfg.update(unlearner={"_target_": target}, learner={}, trusted_packages=packages))
    for command in ("export", "forget", "force"):
        assert _main(*_words(command, folder)) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert packages[0] in error


def test_a_folder_does_not_choose_the_cluster(played: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = Path(shutil.copytree(played / "run", tmp_path / "run"))

    def change(cfg: dict[str, object]) -> None:
        cfg.update(learner={}, trusted_packages=[], backend={"name": "ray", "address": "ray://203.0.113.7:10001"})

    _rewrite(folder, change)
    assert _main("export", folder) == 2
    assert "backend.address=ray://203.0.113.7:10001" in capsys.readouterr().err


def test_a_sweeps_folder_points_to_no_code_either(
    played: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "sweep"
    folder.mkdir()
    job = {"name": "run", "overrides": [*RUN[2:], "learner=own"], "status": "waiting", "error": None}
    index = {"config_dirs": [str(played / "my")], "jobs": [job]}
    (folder / "sweep.json").write_text(json.dumps(index))
    monkeypatch.chdir(tmp_path)
    assert _main("sweep", f"sweep_dir={folder}") == 2
    error = capsys.readouterr().err
    assert f"--config-dir {played / 'my'}" in error
    assert "--trust" in error
    target = [*RUN[2:], "unlearner._target_=posix.system", "trusted_packages=[posix]"]
    (folder / "sweep.json").write_text(json.dumps({"config_dirs": [], "jobs": [{**job, "overrides": target}]}))
    assert _main("sweep", f"sweep_dir={folder}") == 2
    assert "posix" in capsys.readouterr().err
    assert not (played / "made").exists()
