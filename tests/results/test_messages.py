"""What the commands say to those who name the wrong thing: one line, with what happened, where, and what to do."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedcl.cli import main
from fedcl.results import load
from tests.results.rich_run import write_run


def said(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """Return the one line of a command that is refused."""
    assert main(list(map(str, words))) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    return err.strip()


def test_a_folder_of_runs_names_one_of_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "sweep" / "seed-0"
    run.mkdir(parents=True)
    (run / "config.yaml").write_text("seed: 0\n")
    message = said(capsys, "report", run.parent)
    assert message.endswith(f"not a run's folder, it has no config.yaml; the newest run in it is {run}")
    assert said(capsys, "export", tmp_path / "gone").endswith("a run prints its own as its last line")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("summary.json", '{"accuracy/average": 0.'),
        ("env.json", "{"),
        ("events.jsonl", "{'round': 1}\n"),
        ("config.yaml", "seed: [1\n"),
    ],
)
def test_a_damaged_file_is_named(name: str, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path)
    (tmp_path / "config.yaml").write_text("seed: 0\n")
    (tmp_path / name).write_text(text)
    assert said(capsys, "report", tmp_path).startswith(f"fedcl: error: {tmp_path / name}: damaged, it cannot be read")


def test_the_lines_stand_in_for_a_damaged_parquet_file(tmp_path: Path) -> None:
    write_run(tmp_path)
    whole = load(tmp_path).metrics
    (tmp_path / "metrics.parquet").write_text("PAR1 and no more")
    with pytest.warns(UserWarning, match=r"metrics\.parquet: damaged, it cannot be read.*; taking metrics\.jsonl"):
        assert load(tmp_path).metrics.equals(whole)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["sweep", "--jobs", "two"], "--jobs: two: must be a whole number >= 1"),
        (["sweep", "--jobs", "0"], "--jobs: 0: must be a whole number >= 1"),
        (["forget", "x", "--samples", "1,b"], "--samples: 1,b: must be whole numbers apart by commas, such as 1,5,9"),
    ],
)
def test_an_option_says_what_it_takes(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    assert message in capsys.readouterr().err
