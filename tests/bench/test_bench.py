from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from fedcl import bench
from fedcl.bench.result import Result
from fedcl.bench.server import Sizes, server
from fedcl.cli import main

ROOT = Path(__file__).resolve().parents[2]


def test_a_table_and_its_json() -> None:
    result = Result(
        "x", 0.5, False, [{"way": "a", "equal": True, "s": 1.25}, {"way": "bcd", "equal": False, "s": 10.0}]
    )
    assert result.table().splitlines() == [
        "| way | equal | s    |",
        "| --- | ----- | ---- |",
        "| a   | yes   | 1.2  |",
        "| bcd | NO    | 10.0 |",
    ]
    written = json.loads(result.to_json())
    assert (written["bench"], written["ratio"], written["passed"]) == ("x", 0.5, False)
    assert written["rows"] == list(result.rows)
    assert len(written["loadavg"]) == 3
    assert {"torch", "flwr", "ray"} <= written["versions"].keys()


@pytest.mark.parametrize(("passed", "status"), [(True, 0), (False, 1)])
def test_the_exit_status_says_whether_it_passed(
    passed: bool, status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench, "measurement", lambda name: lambda: Result(name, 0.25, passed, [{"way": "a"}]))
    assert main(["bench", "quick", "--json", str(tmp_path / "out.json")]) == status
    assert capsys.readouterr().out.splitlines()[-1] == "ratio 0.25"
    assert json.loads((tmp_path / "out.json").read_text())["passed"] is passed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nosuch"], "nosuch: no such measurement; known: repro, server"),
        (["repro", "--json", "absent/out.json"], "--json absent/out.json: its folder does not exist"),
    ],
)
def test_bad_input_is_refused_before_anything_runs(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["bench", *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.timeout(900)
@pytest.mark.slow
@pytest.mark.ray
def test_repro_finds_one_hash_everywhere() -> None:
    result = bench.measurement("repro")()
    assert result.passed
    assert result.ratio == 1.0
    assert [row["backend"] for row in result.rows] == [
        "inline",
        "ray, workers=1",
        "ray, workers=2",
        "ray, workers=3",
        "inline, killed after round 5 and resumed",
    ]
    assert len({row["SHA-256 of metrics.parquet"] for row in result.rows}) == 1
    assert {row["rounds"] for row in result.rows} == {15}


def test_the_committed_table_is_the_committed_result() -> None:
    folder = ROOT / "benchmarks" / "repro"
    written = json.loads((folder / "results.json").read_text())
    result = Result(written["bench"], written["ratio"], written["passed"], written["rows"])
    assert result.passed
    assert result.table() in (folder / "README.md").read_text()


QUICK = Sizes(
    clients=8, positions=50_003, pairs=5, inputs=96, columns=200, width=48, updates=20, parameters=70_001, repeats=2
)


def test_the_server_measurement_compares_what_it_times() -> None:
    result = server(QUICK)
    ways = [row["what"] for row in result.rows]
    assert ways == ["overlap of 8 x 5e4"] * 3 + ["basis, 96 x 200"] * 2 + ["fold of 20 x 7e4"] * 4
    results = [str(row["result"]) for row in result.rows]
    assert results[1:3] == ["equal to the loop's on the 5 pairs"] * 2
    assert all("same bits" in text for text in results[6:])
    marked = [row for row in result.rows if row["mark"]]
    assert [row["mark"] for row in marked] == [">= 50", ">= 20", ">= 0.5"]
    reached = [float(str(row["ratio"])) / mark for row, mark in zip(marked, (50, 20, 0.5), strict=True)]
    assert result.ratio == pytest.approx(min(reached), rel=0.01)
    for row, share in zip(marked, reached, strict=True):
        assert row["reached"] == ("yes" if share >= 1 else "NO")
    assert result.passed is (result.ratio >= 1)


def test_a_result_that_is_not_as_promised_fails_the_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    import strategies.collaboration.fedcac as fedcac

    real = fedcac.common_bits
    one_less = 1 - torch.eye(QUICK.clients, dtype=torch.int64)
    monkeypatch.setattr(fedcac, "common_bits", lambda packed: real(packed) - one_less)
    result = server(QUICK)
    assert [str(row["result"]).split(" the")[0] for row in result.rows[1:3]] == ["DIFFERS FROM"] * 2
    assert not result.passed


def test_the_committed_server_table_is_the_committed_result() -> None:
    folder = ROOT / "benchmarks" / "server"
    written = json.loads((folder / "results.json").read_text())
    result = Result(written["bench"], written["ratio"], written["passed"], written["rows"])
    assert result.table() in (folder / "README.md").read_text()
    assert not [row for row in written["rows"] if "DIFFERS" in row["result"] or "OTHER" in row["result"]]
    reached = {str(row["what"]).split()[0]: row["reached"] for row in written["rows"] if row["mark"]}
    assert (reached["overlap"], reached["basis,"]) == ("yes", "yes")
