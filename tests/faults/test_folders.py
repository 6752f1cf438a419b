"""Every file of a run's folder, damaged in every way, under every command: what is promised, or one line with the file.

Never a traceback, and never other numbers than those of the whole folder.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from fedcl.cli import main
from fedcl.config.value_rules import ConfigError
from fedcl.results import load
from fedcl.results.progress import Progress
from fedcl.runs.export import load_model

RUN = ["run", "--quiet", "backend=inline", "figures=false", "num_clients=3", "rounds_per_task=1"]
RUN += ["scenario=class_incremental", "scenario.num_tasks=2", "strategy/projection=none", "learner=er"]
RUN += ["checkpoint.min_seconds=0", "unlearner=continue_without", "unlearning.reference=false"]
FIRST = "unlearning.requests=[{id: first, scope: client, clients: [2], at: end}]"
COMMANDS = {
    "over": ["report", "resume", "forget", "verify", "export", "compare"],
    "plain": ["extend", "resume"],
    "stopped": ["report", "resume", "forget"],
    "sweep": ["sweep", "compare"],
}
UNTOLD = ("wall_time", "clients_per_second", "cost/seconds")


class Case(NamedTuple):
    kind: str  # of folder
    file: str
    damage: str
    command: str

    def __str__(self) -> str:
        return f"{self.kind}-{self.command}-{self.file}-{self.damage}"


def _empty(data: bytes) -> bytes:
    return b""


def _cut(data: bytes) -> bytes:
    return data[: len(data) // 2]


def _flip(data: bytes) -> bytes:
    at = int(hashlib.sha256(data).hexdigest(), 16) % max(len(data), 1)
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :] if data else b"\1"


DAMAGES: dict[str, Callable[[bytes], bytes] | None] = {
    "missing": None,
    "folder": None,
    "empty": _empty,
    "cut": _cut,
    "bit": _flip,
    "list": lambda data: b"[]\n",
    "number": lambda data: b"7\n",
    "object": lambda data: b'{"a": {"b": [1]}}\n',
    "latin": lambda data: b"\xff\xfe" + data,
}


def _damage(path: Path, how: str) -> None:
    data = path.read_bytes()
    path.unlink()
    change = DAMAGES[how]
    if how == "folder":
        path.mkdir()
        (path / "something").write_text("else")
    elif change is not None:
        path.write_bytes(change(data))


def _stop(self: Progress, done: int, *args: object) -> None:
    if done == 1:
        raise KeyboardInterrupt


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Whole folders: a run that is over, with a reference and a served request, one without, one stopped, a sweep."""
    base = tmp_path_factory.mktemp("folders")
    made = {kind: base / kind for kind in COMMANDS}
    assert main([*RUN, f"run_dir={made['over']}", FIRST, "compare_with='client.epochs=2'"]) == 0
    assert main(["export", str(made["over"])]) == 0
    assert main([*RUN, f"run_dir={made['plain']}", "compare_with=null"]) == 0
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Progress, "update", _stop)
        assert main([*RUN, f"run_dir={made['stopped']}", "compare_with=null"]) == 130
    assert main(["forget", str(made["stopped"]), "--client", "1", "--id", "bob", "--quiet"]) == 0
    # a sweep's folder with a run that is done in it, as if a process had played it
    made["sweep"].mkdir()
    settings = ["compare_with=null", *RUN[2:]]
    job = {"name": "run", "overrides": settings, "status": "done", "error": None}
    (made["sweep"] / "sweep.json").write_text(json.dumps({"config_dirs": [], "jobs": [job]}))
    shutil.copytree(made["plain"], made["sweep"] / "run")
    return made


@pytest.fixture(scope="module")
def told(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Any]:
    """Return a function giving what a command makes of a whole folder."""
    known: dict[tuple[str, str], Any] = {}

    def made_of(kind: str, command: str) -> Any:
        if (kind, command) not in known:
            folder = Path(shutil.copytree(folders[kind], tmp_path_factory.mktemp("told") / kind))
            known[kind, command] = _run(command, folder)
            assert known[kind, command][0] == 0, known[kind, command]
        return known[kind, command]

    return made_of


def _run(command: str, folder: Path) -> tuple[int, list[str], list[str], Any]:
    """Return the exit status, the warnings, the error lines, and the numbers that came of a command."""
    import contextlib
    import io

    words = {
        "report": ["report", str(folder)],
        "resume": ["resume", "--quiet", str(folder)],
        "forget": ["forget", "--quiet", str(folder), "--class", "1", "--id", "carol"],
        "verify": ["verify", str(folder)],
        "export": ["export", str(folder), "--out", str(folder.parent / "model")],
        "compare": ["compare", str(folder)],
        "extend": ["extend", "--quiet", str(folder), "rounds_per_task=[1,2]", f"run_dir={folder.parent / 'longer'}"],
        "sweep": ["sweep", "--quiet", f"sweep_dir={folder}"],
    }[command]
    out, err = io.StringIO(), io.StringIO()
    with (
        pytest.MonkeyPatch.context() as patch,  # a line must not be broken within a path
        warnings.catch_warnings(record=True) as warned,
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        patch.setenv("COLUMNS", "400")
        warnings.simplefilter("always")
        code = main(words)
    numbers: Any = None
    said = [str(one.message) for one in warned]
    if code == 0 and command in ("report", "compare", "verify"):
        lines = out.getvalue().replace(str(folder), "").splitlines()
        # what takes time, and how the run ended: a STATUS that is not there is said to be unknown
        numbers = [line for line in lines if "s │" not in line and not re.fullmatch(r"\s+\(\w+\)", line)]
    elif code == 0 and command == "export":
        numbers = load_model(folder.parent / "model").about["model_sha256"]
    elif code == 0 and command != "sweep":
        try:
            numbers = _numbers(folder.parent / "longer" if command == "extend" else folder)
        except (ConfigError, UserWarning) as error:  # what the command did not look at is named by who does
            said.append(str(error))
    return code, said, err.getvalue().splitlines(), numbers


def _numbers(folder: Path) -> Any:
    run = load(folder)
    summary = {key: value for key, value in run.summary.items() if not key.endswith(UNTOLD)}
    return summary, run.metrics.to_csv(), sorted(path.name for path in (folder / "certificates").glob("*"))


def _files(folder: Path) -> list[str]:
    kept = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != "something"]
    return [str(path.relative_to(folder)) for path in kept]


def _cases(folders: dict[str, Path]) -> Iterator[Case]:
    for kind, commands in COMMANDS.items():
        for file in _files(folders[kind]):
            if file == "requests.jsonl":  # whoever may write there may ask, or take back what was asked
                continue
            if kind == "sweep" and file.startswith("run/"):  # a job that is not whole is played again, by a process
                continue
            for damage in DAMAGES:
                for command in commands:
                    yield Case(kind, file, damage, command)


def _answer(case: Case, folders: dict[str, Path], told: Callable[[str, str], Any], place: Path) -> str:
    """Return what is wrong with what a command makes of a damaged folder; empty if nothing is."""
    shutil.rmtree(place, ignore_errors=True)
    folder = Path(shutil.copytree(folders[case.kind], place / case.kind))
    _damage(folder / case.file, case.damage)
    code, warned, errors, numbers = _run(case.command, folder)
    name = Path(case.file).name
    if any("Traceback" in line for line in errors):
        return "\n".join(errors)
    if code == 2:
        said = [line for line in errors if line.startswith("fedcl: error:")]
        fallen = any("checkpoint" in line for line in (*warned, *said)) and case.file.startswith("checkpoints")
        edited = name == "config.yaml" and any("changed since the run began" in line for line in said)
        named = len(said) == 1 and (name in said[0] or fallen or edited)
        return "" if named else f"status 2: {errors} {warned}"
    if code == 1:
        return "" if case.command == "verify" else f"status 1: {errors}"
    if code != 0:
        return f"status {code}: {errors}"
    if name == "STATUS" and case.command == "forget":
        return ""  # of a run that is perhaps not over, a request waits until it goes on
    if case.file.startswith("certificates") and case.command != "verify":
        return ""  # a command that writes further ones leaves it to verify to judge the chain
    if numbers != told(case.kind, case.command)[3] and not warned and case.command != "sweep":
        return f"other numbers: {numbers} instead of {told(case.kind, case.command)[3]}"
    return ""


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the figures, which take longer than all the rest."""
    monkeypatch.setattr("fedcl.results.html.page.draw_all", lambda run: ([], {}))


def _wrong(cases: list[Case], folders: dict[str, Path], told: Callable[[str, str], Any], place: Path) -> list[str]:
    found = [(str(case), _answer(case, folders, told, place / "case")) for case in cases]
    return [f"{case}: {why}" for case, why in found if why]


@pytest.mark.usefixtures("undrawn")
def test_some_damaged_files_are_named_or_made_up_for(
    folders: dict[str, Path], told: Callable[[str, str], Any], tmp_path: Path
) -> None:
    cases = sorted(_cases(folders), key=lambda case: hashlib.sha256(str(case).encode()).digest())
    assert len(cases) > 1000
    assert _wrong(cases[:40], folders, told, tmp_path) == []


# FEDCL_PAIRS=k/n takes every n-th case from the k-th on: what has forty minutes takes the parts in turn.
PART, PARTS_OF = map(int, os.environ.get("FEDCL_PAIRS", "0/1").split("/"))


@pytest.mark.slow
@pytest.mark.usefixtures("undrawn")
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("damage", DAMAGES)
def test_every_damaged_file_is_named_or_made_up_for(
    damage: str, folders: dict[str, Path], told: Callable[[str, str], Any], tmp_path: Path
) -> None:
    cases = [case for case in _cases(folders) if case.damage == damage][PART::PARTS_OF]
    assert _wrong(cases, folders, told, tmp_path) == []
