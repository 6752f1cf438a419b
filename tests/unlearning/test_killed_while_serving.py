"""Each request is served exactly once, wherever a run dies around it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import fedcl.runs.unlearning as unlearning_module
from fedcl.cli import main
from fedcl.config.compose import compose
from fedcl.contracts.requests import ForgetRequest
from fedcl.results import checkpoint, recorder
from fedcl.results.checkpoint import Checkpoints
from fedcl.runs.experiment import resume
from fedcl.runs.verify import verify
from fedcl.server.loop import Server
from fedcl.unlearning import certificate
from fedcl.unlearning.service import Unlearning
from fedcl.unlearning.sources import submit
from fedcl.unlearning.view import UnlearningView

RunExperiment = Callable[..., Path]
Hash = Callable[[Path], str]
REQUESTS = (
    "{id: bob, scope: client, clients: [3], at: {round: 2}}, {id: c2, scope: class, classes: [2], at: {round: 2}}"
)
REQUESTS += ", {id: few, scope: sample, samples: [4, 17, 40], at: end}"
METHODS = {
    "retrain": ["learner=er", "unlearner=retrain"],
    "continue": ["learner=er", "unlearning.recovery_rounds=1"],
    "late": ["learner=er", "async.buffer=2", "devices=lognormal", "unlearning.in_flight=rebase"],
}


class Killed(BaseException):
    """Stands for SIGKILL: nothing between here and the test catches it, nothing is tidied up after it."""


def _die(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, *, after: bool = False, when: Any = None) -> None:
    """Die at the first call of ``owner.name`` for which ``when`` holds, before it does anything or when it is done."""
    original = getattr(owner, name)

    def dying(*args: Any, **kwargs: Any) -> Any:
        if when is not None and not when(*args, **kwargs):
            return original(*args, **kwargs)
        if after:
            original(*args, **kwargs)
        raise Killed

    monkeypatch.setattr(owner, name, dying)


def _alone(*args: Any, **kwargs: Any) -> bool:
    return bool(kwargs.get("alone"))


def _second(*args: Any, **kwargs: Any) -> bool:
    return "0002" in str(args[0])


def _named_served(*args: Any, **kwargs: Any) -> bool:
    return "_0001" in str(args[1])


POINTS: dict[str, tuple[Any, str, dict[str, Any]]] = {
    "admitted": (Unlearning, "_process", {}),
    "asked": (UnlearningView, "forget", {}),
    "expelled": (Server, "remove_clients", {"after": True}),
    "edited": (Server, "edit", {"after": True}),
    "recovered": (Server, "recover", {"after": True}),
    "served": (certificate, "write", {}),
    "between two certificates": (certificate, "write_atomic", {"when": _second}),
    "certified": (certificate, "write", {"after": True}),
    "noted": (Checkpoints, "save", {"when": _alone}),
    "within the checkpoint": (checkpoint, "write_bytes_atomic", {"when": lambda path, _: "_0001" in str(path)}),
    "checkpoint not named": (checkpoint, "write_atomic", {"when": _named_served}),
    "checkpoint named": (checkpoint, "write_atomic", {"after": True, "when": _named_served}),
    "saved": (Checkpoints, "save", {"after": True, "when": _alone}),
    "purged": (unlearning_module, "purge", {"after": True}),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a function giving the folder of a method's undisturbed run, played once."""
    from fedcl.runs.experiment import run
    from tests.unlearning.conftest import SMALL

    folders: dict[str, Path] = {}

    def of(method: str) -> Path:
        if method not in folders:
            folders[method] = tmp_path_factory.mktemp("whole") / method
            requests = [f"unlearning.requests=[{REQUESTS}]", f"run_dir={folders[method]}"]
            settings = [*SMALL, *METHODS[method], *requests]
            run(compose(settings), settings, [], quiet=True)
        return folders[method]

    return of


def _certificates(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted((folder / "certificates").glob("*.json"))]


def _timeless(content: dict[str, Any]) -> dict[str, Any]:
    fleeting = ("time", "previous", "sha256", "run")  # the settings name the folder
    kept = {name: value for name, value in content.items() if name not in fleeting}
    salted = {**kept["request"], "samples": len(kept["request"]["samples"])}
    cost = {name: value for name, value in kept["cost"].items() if "seconds" not in name}
    return {**kept, "request": salted, "cost": cost}


def _equal(cut: Path, whole: Path, metrics_hash: Hash) -> None:
    assert metrics_hash(cut) == metrics_hash(whole)
    names = [path.name for path in sorted((cut / "certificates").glob("*.json"))]
    assert names == ["0001-bob.json", "0002-c2.json", "0003-few.json"]
    assert [_timeless(c) for c in _certificates(cut)] == [_timeless(c) for c in _certificates(whole)]
    assert verify(cut, retrain=False)


@pytest.mark.parametrize(
    ("method", "point"),
    [
        pytest.param(method, point, marks=[] if method == "continue" and place % 8 == 0 else [pytest.mark.slow])
        for method in METHODS
        for place, point in enumerate(POINTS)
    ],
)
def test_killed_anywhere_around_serving(
    method: str, point: str, whole: Callable[[str], Path], run_small: RunExperiment, tmp_path: Path, metrics_hash: Hash
) -> None:
    undisturbed = whole(method)
    if point == "asked" and method == "retrain":
        pytest.skip("retraining asks no client to forget: their states become those of another run")
    owner, name, how = POINTS[point]
    with pytest.MonkeyPatch.context() as patched:
        _die(patched, owner, name, **how)
        with pytest.raises(Killed):
            run_small("cut", *METHODS[method], requests=REQUESTS)
    resume(tmp_path / "cut", force=False, quiet=True)
    _equal(tmp_path / "cut", undisturbed, metrics_hash)
    checkpoints = [path.name for path in (tmp_path / "cut" / "checkpoints").glob("round_*")]
    assert checkpoints == ["round_000003"]


@pytest.mark.slow
def test_killed_by_the_system_without_a_word(whole: Callable[[str], Path], tmp_path: Path, metrics_hash: Hash) -> None:
    from tests.unlearning.conftest import SMALL

    undisturbed = whole("continue")
    program = "import os, sys; from fedcl.unlearning import certificate; from fedcl.cli import main\n"
    program += "certificate.write_atomic = lambda *_: os._exit(9)\nsys.exit(main(sys.argv[1:]))"
    requests = [f"unlearning.requests=[{REQUESTS}]", f"run_dir={tmp_path / 'cut'}"]
    command = [sys.executable, "-c", program, "run", "--quiet", *SMALL, *METHODS["continue"], *requests]
    died = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=120)
    assert died.returncode == 9
    assert (tmp_path / "cut" / "STATUS").read_text() == "running\n"
    assert main(["resume", str(tmp_path / "cut"), "--quiet"]) == 0
    _equal(tmp_path / "cut", undisturbed, metrics_hash)


def test_a_request_that_came_while_a_round_ran_comes_in_the_same_round_again(
    run_small: RunExperiment, tmp_path: Path, metrics_hash: Hash, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run is killed after it has met the request, and goes on from a checkpoint before that."""
    asked, aggregate = ForgetRequest("later", "client", clients=("1",)), Server._aggregate

    def asking(self: Server, server_round: int, arrived: Any) -> None:
        folder = self.record.run_dir  # type: ignore[attr-defined]
        if server_round == 1 and not (folder / "requests.jsonl").exists():
            submit(folder, asked)
        aggregate(self, server_round, arrived)

    monkeypatch.setattr(Server, "_aggregate", asking)
    # met before round 2, served before round 4; the only checkpoints before that are of the first round
    settings = ("learner=er", "rounds_per_task=3", "unlearning.window=2", "checkpoint.min_seconds=1000")
    undisturbed = run_small("whole", *settings)
    assert [c["server_round"] for c in _certificates(undisturbed)] == [4]
    with pytest.MonkeyPatch.context() as patched:
        _die(patched, recorder.Recorder, "timing", when=lambda self, at, name, _: (at, name) == (3, "round"))
        with pytest.raises(Killed):
            run_small("cut", *settings)
    assert (tmp_path / "cut" / "checkpoints" / "LATEST").read_text() == "round_000000\n"
    assert (tmp_path / "cut" / "requests.taken.jsonl").exists()
    resume(tmp_path / "cut", force=False, quiet=True)
    assert metrics_hash(tmp_path / "cut") == metrics_hash(undisturbed)
    assert [_timeless(c) for c in _certificates(tmp_path / "cut")] == [_timeless(c) for c in _certificates(undisturbed)]
    assert verify(tmp_path / "cut")


def test_a_finished_run_killed_while_it_serves_is_resumed(finished: Path) -> None:
    with pytest.MonkeyPatch.context() as patched:
        _die(patched, certificate, "write")
        with pytest.raises(Killed):
            main(["forget", str(finished), "--client", "1", "--id", "mine", "unlearner=continue_without"])
    assert len(_certificates(finished)) == 1
    assert main(["resume", str(finished), "--quiet"]) == 0
    _, mine = _certificates(finished)
    assert mine["unlearner"]["name"].endswith("ContinueWithout")  # as it was asked for
    assert verify(finished)
    assert main(["resume", str(finished), "--quiet"]) == 0
    assert len(_certificates(finished)) == 2
