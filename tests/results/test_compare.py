from __future__ import annotations

import csv
import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
import yaml

from fedcl.cli import main
from fedcl.config.compose import compose
from fedcl.config.value_rules import ConfigError
from fedcl.results.compare import compare, run_folders
from fedcl.results.tables import FORMATS, render

ER = {"er": {"_target_": "clients.learners.er.ER", "budget": 200}}
EWC = {"ewc": {"_target_": "clients.learners.ewc.EWC", "weight": 10.0}}
PLAIN: dict[str, Any] = {"strategy.projection": {}}


def write_run(folder: Path, settings: dict[str, Any], *, status: str = "done", **summary: float) -> Path:
    """Write what `compare` reads of a run that differs from the default in these settings."""
    cfg = compose([])  # the work is done once a process
    for key, value in {"run_dir": str(folder), **settings}.items():
        *path, last = key.split(".")
        node = cfg
        for name in path:
            node = node[name]
        node[last] = value
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(cfg, sort_keys=False))
    (folder / "STATUS").write_text(status + "\n")
    (folder / "summary.json").write_text(json.dumps({key.replace("__", "/"): v for key, v in summary.items()}))
    return folder


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    for seed, (plain, replay) in enumerate([(0.50, 0.60), (0.52, 0.64), (0.54, 0.68)]):
        fixed = PLAIN | {"seed": seed}
        write_run(tmp_path / f"a{seed}", fixed, accuracy__average=plain, bytes__up=1000.0)
        replaying = fixed | {"learner": ER, "backend.name": "inline"}
        write_run(tmp_path / f"b{seed}", replaying, accuracy__average=replay, bytes__up=1e3)
    return tmp_path


def test_rows_means_intervals_and_tests_by_hand(runs: Path) -> None:
    found = compare([runs])
    assert [row.name for row in found.rows] == ["learner=finetune", "learner=er"]
    assert [row.seeds for row in found.rows] == [(0, 1, 2), (0, 1, 2)]
    assert found.metrics == ("accuracy/average",)
    plain, replay = (row.cells[0] for row in found.rows)
    assert plain.mean == pytest.approx(0.52)
    assert plain.half_width == pytest.approx(4.302653 * 0.02 / math.sqrt(3))
    assert plain.test is None
    assert replay.test is not None
    # differences 0.10, 0.12, 0.14: mean 0.12, deviation 0.02
    assert replay.test.difference == pytest.approx(0.12)
    t = 0.12 / (0.02 / math.sqrt(3))
    assert replay.test.p_t == pytest.approx(1 - t / math.sqrt(2 + t * t))
    assert replay.test.p_exact == 0.25


def test_every_format_says_the_same(runs: Path) -> None:
    found = compare([runs], metrics=["accuracy/average", "bytes/up"], baseline="learner=finetune")
    markdown = render(found, "markdown")
    first = next(line for line in markdown.splitlines() if line.startswith("| learner=er"))
    assert "64.00 ± 9.94" in first
    assert "+12.00 ± 4.97; p 0.009, 0.250; 3 pairs" in first
    assert "never below 2/2^n" in markdown
    rows = {(row["configuration"], row["metric"]): row for row in csv.DictReader(io.StringIO(render(found, "csv")))}
    assert float(rows["learner=er", "accuracy/average"]["difference"]) == pytest.approx(0.12)
    assert rows["learner=er", "accuracy/average"]["values"] == "0:0.6 1:0.64 2:0.68"
    assert rows["learner=finetune", "bytes/up"]["pairs"] == ""
    assert r"accuracy/average (\%) & difference & bytes/up" in render(found, "latex")
    assert '<th scope="row">learner=er</th><td>3</td><td>64.00 ± 9.94</td>' in render(found, "html")
    with pytest.raises(ValueError, match="must be one of"):
        render(found, "pdf")


def test_what_is_not_done_or_repeated_is_named_and_left_out(runs: Path) -> None:
    write_run(runs / "c0", PLAIN | {"learner": EWC}, status="running", accuracy__average=0.9)
    write_run(runs / "d0", PLAIN | {"checkpoint.keep": 9}, accuracy__average=0.9)
    found = compare([runs])
    assert len(found.rows) == 2
    assert found.left_out == (
        f"{runs / 'c0'}: not done (running); wait for it or, if it was killed: fedcl resume {runs / 'c0'}",
        f"{runs / 'd0'}: the same settings and seed as another run",
    )
    assert all(line in render(found, "markdown") for line in found.left_out)


def index(folder: Path, *names: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "sweep.json").write_text(json.dumps({"jobs": [{"name": name} for name in names]}))


def refusal(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """Return the one line that a comparison is refused with."""
    assert main(["compare", *map(str, words)]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    return err.removeprefix("fedcl: error: ").strip()


def test_a_sweep_is_in_the_order_of_its_jobs_and_names_those_that_never_began(runs: Path) -> None:
    index(runs, "b0", "a1", "z9", "a0")
    assert [path.name for path in run_folders(runs)] == ["b0", "a1", "a0", "a2", "b1", "b2"]
    found = compare([runs])
    assert found.rows[0].name == "learner=er"
    going_on = f"fedcl sweep sweep_dir={runs} goes on"
    assert found.left_out == (f"{runs}: 1 of 4 jobs not done (z9 not begun); {going_on}",)


def test_an_unfinished_sweep_says_how_to_finish_it(
    runs: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(runs)
    for seed in range(3):
        (runs / f"b{seed}" / "STATUS").write_text("interrupted\n")
    index(runs, "a0", "a1", "a2", "b0", "b1", "b2", "c0")
    assert main(["compare", "."]) == 0
    left = ".: 4 of 7 jobs not done (3 interrupted, 1 not begun); fedcl sweep sweep_dir=. goes on"
    assert f"Left out: {left}" in capsys.readouterr().out
    assert refusal(capsys, ".", "--baseline", "learner=er") == (
        "--baseline learner=er: fits no row; the rows: 'run'; runs that are not done have none: 4"
    )
    assert refusal(capsys, ".", "--baseline", "b0") == (
        "--baseline b0: not done (interrupted); fedcl sweep sweep_dir=. goes on with it"
    )
    for seed in range(3):
        (runs / f"a{seed}" / "STATUS").write_text("failed\n")
    nothing = ".: 7 of 7 jobs not done (3 failed, 3 interrupted, 1 not begun); fedcl sweep sweep_dir=. goes on"
    assert refusal(capsys, ".") == f"nothing to compare yet: {nothing}"
    index(runs / "new", "a", "b")
    waiting = "2 of 2 jobs not done (a not begun, b not begun); fedcl sweep sweep_dir=new goes on"
    assert refusal(capsys, "new") == f"nothing to compare yet: new: {waiting}"


def test_a_folder_that_is_no_run_says_what_is_wanted(
    runs: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(runs)
    (runs / "empty").mkdir()
    (runs / "note.txt").write_text("")
    wanted = "name a run's folder"
    assert refusal(capsys, "absent") == f"absent: not there; {wanted} or a sweep's"
    assert refusal(capsys, "note.txt") == f"note.txt: no folder; {wanted} or a sweep's"
    assert refusal(capsys, "empty") == f"empty: holds no run; {wanted}, with a config.yaml, or one with runs in it"
    assert refusal(capsys, "a0", "--baseline", "b0").startswith("--baseline b0: not among the compared runs")
    (runs / "sweep.json").write_text("{}")
    assert refusal(capsys, ".").startswith("sweep.json: not the index of a sweep; remove it")
    (runs / "sweep.json").unlink()
    (runs / "a0" / "summary.json").write_text('{"accuracy/average": 0.5')
    said = refusal(capsys, "a0")
    assert said.startswith("a0/summary.json: damaged, it cannot be read")
    assert said.endswith("fedcl resume a0 writes it again")
    (runs / "a0" / "config.yaml").write_text("name: other\n")
    assert refusal(capsys, "a0") == "a0/config.yaml: has no seed; leave a0 out"


def test_unequal_seeds_are_told_and_tested_over_the_shared_ones(runs: Path) -> None:
    (runs / "b2" / "STATUS").write_text("running\n")
    write_run(runs / "c7", PLAIN | {"learner": EWC, "seed": 7}, accuracy__average=0.5)
    text = render(compare([runs]), "markdown")
    lacking = "learner=finetune lacks 7; learner=er lacks 2, 7; learner=ewc lacks 0, 1, 2"
    assert f"Unequal seeds: {lacking}. Values are over a row's own seeds; to make them even, run those." in text
    rows = {line.split("|")[1].strip(): line for line in text.splitlines() if line.startswith("| learner=")}
    assert "2 pairs" in rows["learner=er"]
    assert "no pairs" in rows["learner=ewc"]
    (runs / "b2" / "STATUS").write_text("done\n")
    assert "Unequal" not in render(compare([runs / name for name in ("a0", "a1", "a2", "b0", "b1", "b2")]), "markdown")


@pytest.mark.parametrize(
    ("key", "value"),
    [("data.partition.alpha", 0.1), ("num_clients", 4), ("scenario.num_tasks", 2), ("exclude.clients", [1])],
)
def test_other_streams_are_refused(key: str, value: object, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    places = [str(write_run(tmp_path / "a", {}, accuracy__average=0.5))]
    places.append(str(write_run(tmp_path / "b", {key: value}, accuracy__average=0.6)))
    assert main(["compare", *places]) == 2
    error = capsys.readouterr().err
    assert f"{key}: " in error
    assert "--force" in error
    assert error.count("\n") == 1
    assert main(["compare", *places, "--force"]) == 0
    assert "Other stream: " in capsys.readouterr().out


def test_rows_are_named_by_what_differs(tmp_path: Path) -> None:
    stock = {"_target_": "flwr.serverapp.strategy.FedAdam", "eta": 0.1}
    chosen: list[dict[str, Any]] = [
        {"learner": EWC | ER},
        {"learner": EWC | {"er": ER["er"] | {"budget": 40}}},
        PLAIN,
        {"strategy": {"stock": stock}},
        PLAIN | {"client.epochs": 2},
    ]
    for i, settings in enumerate(chosen):
        write_run(tmp_path / str(i), settings, accuracy__average=0.5)
    names = [row.name for row in compare([tmp_path]).rows]
    assert names == [
        "strategy=pipeline projection=FOT learner=ewc+er learner.er.budget=200 client.epochs=1",
        "strategy=pipeline projection=FOT learner=ewc+er learner.er.budget=40 client.epochs=1",
        "strategy=pipeline projection=none learner=finetune client.epochs=1",
        "strategy=FedAdam learner=finetune client.epochs=1",
        "strategy=pipeline projection=none learner=finetune client.epochs=2",
    ]


def test_one_configuration_and_one_seed_have_no_interval_and_no_test(tmp_path: Path) -> None:
    write_run(tmp_path / "a", {}, accuracy__average=0.5)
    text = render(compare([tmp_path]), "markdown")
    assert "| run           |     1 |                50.00 |" in text
    write_run(tmp_path / "b", {"learner": ER, "seed": 1}, accuracy__average=0.5)
    assert "no pairs" in render(compare([tmp_path]), "markdown")


def test_bad_input(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match="did you mean accuracy/average"):
        compare([runs], metrics=["accuracy/averge"])
    with pytest.raises(ConfigError, match="fits no row"):
        compare([runs], baseline="learner=lwf")
    with pytest.raises(ConfigError, match="not there"):
        run_folders(tmp_path / "absent")
    assert compare([runs], baseline=str(runs / "b1")).baseline == 1
    assert main(["compare", str(runs), "--out", str(tmp_path / "no" / "t.csv")]) == 2
    assert main(["compare", str(runs), "--out", "/dev/null"]) == 2
    assert Path("/dev/null").is_char_device()
    capsys.readouterr()
    assert main(["compare", str(runs), "--format", "csv", "--out", str(tmp_path / "t.csv")]) == 0
    assert (tmp_path / "t.csv").read_text().startswith("configuration,metric,")


def test_the_command_takes_every_format() -> None:
    from fedcl.cli import _parser  # the command's choices are written out, so that help needs no table

    parser: Any = _parser()
    compare_parser = parser._subparsers._group_actions[0].choices["compare"]
    choices = next(action.choices for action in compare_parser._actions if action.dest == "format")
    assert set(choices) == set(FORMATS)
