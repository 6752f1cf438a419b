"""Every `fedcl ...` on a page is one that fedcl takes; those of README and tutorial are run."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from fedcl import cli
from fedcl.bench import BENCHES
from fedcl.config import compose, kinds
from fedcl.sweep.expansion import expand

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(
    [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md"), *(ROOT / "benchmarks").rglob("*.md")]
)
FENCE = re.compile(r"^ *```(?P<language>\w*)\n(?P<body>.*?)^ *```\s*$", re.MULTILINE | re.DOTALL)
OWN_FILE = re.compile(
    r"`(?P<path>my/[\w/]+\.\w+)`[^`]*?(?:`fedcl[^`]*`[^`]*?)?\n```\w+\n(?P<body>.*?)^```", re.MULTILINE | re.DOTALL
)
SHORT = {
    "backend": "inline", "num_clients": "4", "rounds_per_task": "1", "scenario.num_tasks": "2", "client.epochs": "1",
    "figures": "false",
}  # fmt: skip


@dataclass(frozen=True)
class Command:
    """A command as a page has it; `typed` where it stands in a block, to be typed, and not within a sentence."""

    page: Path
    words: tuple[str, ...]
    typed: bool

    def __str__(self) -> str:
        return shlex.join(self.words)


def commands(page: Path) -> Iterator[Command]:
    text = page.read_text(encoding="utf-8")
    shell = [found["body"] for found in FENCE.finditer(text) if found["language"] in ("bash", "sh", "console")]
    prose = FENCE.sub("", text)
    indented = re.findall(r"(?:^ {4,}\S.*\n?)+", prose, re.MULTILINE)
    for block in [*shell, *indented]:
        for line in re.sub(r"\\\n\s*", "", block).splitlines():
            yield from (Command(page, words, True) for words in _fedcl(line))
    for span in re.findall(r"(?<!`)`(fedcl\s[^`]+)`(?!`)", re.sub(r"^ {4,}.*$", "", prose, flags=re.MULTILINE)):
        yield from (Command(page, words, False) for words in _fedcl(" ".join(span.split())))


def _fedcl(line: str) -> Iterator[tuple[str, ...]]:
    for part in re.split(r"\s&&\s", line.strip()):
        if re.match(r"(\.venv/bin/)?fedcl\s+[a-z-]", part):
            yield tuple(shlex.split(part, comments=True)[1:])


def _names_only(words: tuple[str, ...]) -> bool:
    """Whether the words name a command, as a sentence does, and give it nothing."""
    return len(words) <= 2 and all(re.fullmatch(r"[a-z]+|--help", word) for word in words)


def _parsed(command: Command) -> argparse.Namespace | None:
    said = io.StringIO()
    words = list(command.words)
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            return cli._parse(words)
    except SystemExit as stop:
        if stop.code == 0:
            return None  # --help
        if not command.typed and _names_only(command.words) and "invalid choice" not in said.getvalue():
            return None
        pytest.fail(f"{command.page.relative_to(ROOT)}: fedcl {command}: {said.getvalue().splitlines()[-1]}")


def _all() -> list[Command]:
    return [command for page in PAGES for command in commands(page)]


def test_the_pages_have_commands() -> None:
    found = _all()
    assert len([command for command in found if command.typed]) > 80
    assert len({command.words[0] for command in found}) >= 10
    several = [command for command in found if command.page.name == "unlearning_cdp.md"]
    assert any("unlearning.requests" in str(command) for command in several), "a continued line is one command"


def test_every_command_on_a_page_is_one() -> None:
    for command in _all():
        args = _parsed(command)
        if args is None:
            continue
        if args.name == "bench" and args.bench != "NAME":
            assert args.bench in BENCHES, f"{command.page}: {command}"
        if args.name == "list" and args.kind is not None:
            assert args.kind in kinds(), f"{command.page}: {command}"


def test_a_command_that_is_none_is_noticed(tmp_path: Path) -> None:
    page = ROOT / "README.md"
    for words in (("rum", "seed=1"), ("report",), ("run", "--figures"), ("deploy", "start", "fleet")):
        with pytest.raises(pytest.fail.Exception, match="README"):
            _parsed(Command(page, words, True))


def _own_files(page: Path, folder: Path) -> None:
    """Write the files that a page shows, such as `my/learner/mine.yaml`, to where it says they are.

    A page that shows none, and yet speaks of `--config-dir my`, means those of docs/own_learner.md.
    """
    shown = list(OWN_FILE.finditer(page.read_text(encoding="utf-8")))
    for found in shown or OWN_FILE.finditer((ROOT / "docs" / "own_learner.md").read_text(encoding="utf-8")):
        file = folder / found["path"]
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(found["body"], encoding="utf-8")


def _configurations(args: argparse.Namespace) -> list[list[str]]:
    """Return the overrides of every configuration that a command makes."""
    if args.name == "run" or args.name == "extend":
        return [args.overrides]
    if args.name == "deploy" and args.action in ("run", "local"):
        return [[*args.overrides, "backend=flower", "compare_with=null"]]
    if args.name == "forget":
        return [[*([] if args.unlearner is None else [f"unlearner={args.unlearner}"]), *args.overrides]]
    if args.name != "sweep":
        return []
    settings = [text for text in args.overrides if not text.startswith("sweep_dir=")]
    fresh: set[str] = set()
    jobs = []
    for job in expand(settings, args.config_dir):  # each value once is enough: jobs differ in how they are combined
        if not fresh.issuperset(job.overrides):
            fresh.update(job.overrides)
            jobs.append(list(job.overrides))
    return jobs


@pytest.mark.slow
@pytest.mark.parametrize(
    "page",
    [page for page in PAGES if any(True for _ in commands(page))],
    ids=lambda page: page.relative_to(ROOT).as_posix(),
)
def test_every_command_on_a_page_is_a_sound_configuration(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    _own_files(page, tmp_path)
    for command in dict.fromkeys(commands(page)):
        args = _parsed(command)
        for overrides in _configurations(args) if args is not None else []:
            assert compose(overrides, args.config_dir)["seed"] >= 0, str(command)


def _shortened(words: list[str], data: Path | None) -> list[str]:
    """Return the command with few clients, rounds and tasks in place of what it has, so that it takes seconds."""
    if words[0] not in ("run", "sweep"):
        return words
    if data is not None:
        words = [word.replace("/data/mnist", str(data / "mnist")) for word in words]
        words = [
            word.replace('mnist"]', 'mnist","data.source.train_limit=400","data.source.test_limit=200"]')
            for word in words
        ]
    words = [word.replace("seed=0,1,2", "seed=0,1") for word in words]  # each job is a process of its own
    given = {word.partition("=")[0] for word in words}
    keep = [word for word in words if word.partition("=")[0] not in SHORT]
    if "clients_per_round" in given:
        keep = [word for word in keep if not word.startswith("clients_per_round=")] + ["clients_per_round=2"]
    if "data" in given:
        keep += ["data.source.train_limit=400", "data.source.test_limit=200"]
    return [*keep, *(f"{key}={value}" for key, value in SHORT.items())]


def _run(words: list[str], folder: Path) -> str:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "fedcl", *words], cwd=folder, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"fedcl {shlex.join(words)}: {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr}"
    return done.stdout


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_tutorial_is_run_from_its_first_line_to_its_last(tmp_path: Path) -> None:
    page = ROOT / "docs" / "tutorial.md"
    _own_files(page, tmp_path)
    for command in commands(page):
        if command.typed:
            _run(_shortened(list(command.words), None), tmp_path)
    assert {"first", "er", "pair", "mine", "late"} <= {path.name for path in (tmp_path / "runs").iterdir()}
    assert (tmp_path / "runs" / "first" / "report.html").is_file()
    assert "learner=ewc" not in (tmp_path / "table.tex").read_text()
    assert "unsure" in (tmp_path / "mine.html").read_text()
    late = next(command for command in commands(page) if any("async.deadline" in word for word in command.words))
    whole = [word for word in late.words if not word.startswith("run_dir=")]
    _run([*whole, "backend=inline", "figures=false", "run_dir=runs/whole"], tmp_path)
    assert json.loads((tmp_path / "runs" / "whole" / "summary.json").read_text())["staleness/max"] >= 1
    loader = next(body for body in _python(page) if "load_model" in body)
    done = subprocess.run([sys.executable, "-c", loader], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)},
                          capture_output=True, text=True, check=True)  # fmt: skip
    assert "0" in done.stdout


def _python(page: Path) -> list[str]:
    text = page.read_text(encoding="utf-8")
    return [found["body"] for found in FENCE.finditer(text) if found["language"] == "python"]


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_commands_of_the_readme_are_run(tmp_path: Path) -> None:
    page = ROOT / "README.md"
    data = Path(os.environ["FEDCL_DATA"]) if "FEDCL_DATA" in os.environ else None
    _own_files(page, tmp_path)
    _run(_shortened(["run", "run_dir=class_stream", "learner=er", "strategy/projection=none"], None), tmp_path)
    domains = [
        "run",
        "run_dir=domain_stream",
        "scenario=domain_permuted",
        "checkpoint.min_seconds=0",
        "checkpoint.keep=9",
    ]
    _run(_shortened(domains, None), tmp_path)
    forgotten = ""
    for number, command in enumerate(command for command in commands(page) if command.typed):
        words = list(command.words)
        if words[0] == "deploy" or (data is None and "/data/" in str(command)):
            continue  # tests/deployment plays `fedcl deploy local`; real MNIST has to be there
        for place, word in enumerate(words):
            if word == "RUN_DIR" and words[0] == "verify":
                words[place] = forgotten  # certificates are where something was forgotten
            elif word == "RUN_DIR":  # each other command gets a folder that no other one has changed
                words[place] = f"copy{number}_{place}"
                forgotten = words[place] if words[0] == "forget" else forgotten
                shutil.copytree(tmp_path / ("domain_stream" if words[0] == "extend" else "class_stream"),
                                tmp_path / words[place])  # fmt: skip
        _run(_shortened(words, data), tmp_path)
