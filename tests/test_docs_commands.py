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
from fedcl.config.compose import compose, kinds
from fedcl.sweep.expansion import expand
from tests.toy import missing

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(
    [
        *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "notebooks/README.md")),
        *(file for folder in ("docs", "benchmarks") for file in (ROOT / folder).rglob("*.md")),
    ]
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
        part = re.sub(r"^([A-Z_]+=(<[^>]*>|\S*)\s+)+", "", part)  # FEDCL_DATA=... in front of it
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


# What stands for files of the reader's own, and what is there instead: with the data that FEDCL_DATA names.
STANDS_FOR = {"/data/mnist": "{data}/mnist", "data.root=DIR": "data.root={data}/fashion_mnist"}
NEEDS_MORE = {"backend.address": "a Ray cluster", "gpus_per_worker": "a GPU", "worker_classes": "a Ray cluster",
              "protocol=two_phase": "whole runs: the test of the README plays it"}  # fmt: skip
# Numbers that make a run long before its first round is over, or that only its later rounds need.
BRIEF = ["figures=false", "evaluation.every=0"]


def _starts(command: Command, folder: Path) -> list[str] | str:
    """Return the words that start a command of a page here, or why it cannot be started."""
    words = list(command.words)
    for key, need in NEEDS_MORE.items():
        if any(key in word for word in words):
            return f"{command}: needs {need}"
    data = os.environ.get("FEDCL_DATA", "")
    for there, here in STANDS_FOR.items():
        if any(there in word for word in words) and not data:
            return f"{command}: needs the data that FEDCL_DATA names"
        words = [word.replace(there, here.format(data=data)) for word in words]
    for word in words:
        if word.startswith("data=") and (why := missing(word)):
            return why
        if word == "data/partition=two_classes" and (why := missing("data/partition=flwr")):
            return why
        if word.startswith("experiment="):
            root = Path(compose([word])["data"]["root"] or "digits").stem
            if why := missing(f"data={root}"):
                return why
        if word == "devices.path=devices.csv":
            (folder / "devices.csv").write_text("client,speed\n" + "".join(f"{i},1\n" for i in range(10)))
    if words[0] == "sweep":
        return [*words, *(f"{key}={value}" for key, value in SHORT.items() if not _given(words, key))]
    backend = [] if any(word.startswith("backend") for word in words) else ["backend=inline"]
    # what tunes needs a number to compare
    brief = BRIEF[:1] if any(word.startswith("protocol=") for word in words) else BRIEF
    return [*words, *backend, *brief, *([] if _given(words, "run_dir") else ["run_dir=run"])]


def _given(words: list[str], key: str) -> bool:
    return any(word.partition("=")[0] == key for word in words)


def _where_it_is_typed(page: Path, folder: Path) -> None:
    """Put into a folder what a page's commands find there: the files that it shows, and the repository's."""
    _own_files(page, folder)
    if page.is_relative_to(ROOT / "benchmarks"):
        (folder / "benchmarks").symlink_to(ROOT / "benchmarks")


def _start(command: Command, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Start a command of a page in its folder, as it is typed; its run stops after the first round."""
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", [*sys.path])
    _where_it_is_typed(command.page, folder)
    words = _starts(command, folder)
    if isinstance(words, str):
        pytest.skip(words)
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
        status = cli.main(words)
    for name, module in list(sys.modules.items()):  # the next page may have another module of this name
        if str(getattr(module, "__file__", None)).startswith(f"{folder}{os.sep}my{os.sep}"):
            del sys.modules[name]
    assert status == 0, f"{command.page}: fedcl {shlex.join(words)}: {said.getvalue()[-2000:]}"


RUNS = list(dict.fromkeys(command for command in _all() if command.words[0] == "run" and len(command.words) > 1))
QUICK = [command for command in RUNS if "as_published" in str(command)] + RUNS[:: len(RUNS) // 3]


def _whole_line(command: Command) -> bool:
    """Whether a command has all that it takes: within a sentence, `fedcl run --help` tells of it alone."""
    return not _names_only(command.words) and "--help" not in command.words


@pytest.mark.usefixtures("one_round")
@pytest.mark.parametrize(
    "command",
    [
        pytest.param(
            command,
            marks=() if command in QUICK else pytest.mark.slow,
            id=f"{command.page.parent.name}-{command.page.stem}-{place}",
        )
        for place, command in enumerate(RUNS)
        if _whole_line(command)
    ],
)
@pytest.mark.timeout(600)
def test_a_run_on_a_page_begins(command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _start(command, tmp_path / "here", monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize(
    "page",
    [page for page in PAGES if any(command.words[0] != "run" for command in commands(page))],
    ids=lambda page: page.relative_to(ROOT).as_posix(),
)
def test_every_other_command_on_a_page_is_a_sound_configuration(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    _own_files(page, tmp_path)
    for command in dict.fromkeys(commands(page)):
        args = None if command.words[0] == "run" else _parsed(command)
        for overrides in _configurations(args) if args is not None else []:
            assert compose(overrides, args.config_dir)["seed"] >= 0, str(command)


SCRIPT = re.compile(r"^ *(?:[A-Z_]+=(?:<[^>]*>|\S*) +)*python (?P<words>(?:-m )?benchmarks[/.].*)$", re.MULTILINE)
SCRIPTS = sorted(
    {
        (page.relative_to(ROOT).as_posix(), " ".join(found["words"].split()))
        for page in (ROOT / "benchmarks").rglob("*.md")
        for found in SCRIPT.finditer(page.read_text(encoding="utf-8"))
    }
)
TAKES = """
import argparse, runpy, sys
real = argparse.ArgumentParser.parse_args
def parse_args(self, args=None, namespace=None):
    real(self, args, namespace)
    print("taken")
    raise SystemExit(0)
argparse.ArgumentParser.parse_args = parse_args
module, *sys.argv[1:] = sys.argv[1:]
sys.argv[0] = module
runpy.run_module(module, run_name="__main__", alter_sys=False)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("page", "line"), SCRIPTS)
def test_a_benchmarks_script_takes_the_words_on_its_page(page: str, line: str, tmp_path: Path) -> None:
    words = shlex.split(line, comments=True)
    file, *rest = words[1:] if words[0] == "-m" else words
    module = file.removesuffix(".py").replace("/", ".")
    source = (ROOT / module.replace(".", "/")).with_suffix(".py").read_text(encoding="utf-8")
    if "parse_args" not in source:
        assert rest == [], f"{page}: {line}: takes no options"
        compile(source, file, "exec")
        return
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", TAKES, module, *rest], cwd=tmp_path, env=env, capture_output=True,
                          text=True, check=False)  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "taken\n"), f"{page}: {line}: {done.stderr[-2000:]}"


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
