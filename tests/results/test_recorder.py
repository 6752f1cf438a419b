from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from fedcl.base.files import write_atomic
from fedcl.results import schema
from fedcl.results.environment import create_run_dir, environment
from fedcl.results.recorder import Recorder
from fedcl.results.schema import Row
from fedcl.results.writing import to_parquet, write_launch


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def write_rounds(recorder: Recorder, rounds: range) -> None:
    for server_round in rounds:
        value = 1 / (server_round + 3)
        recorder.row(round=server_round, phase="test", name="accuracy", value=value, task=0, after=0, virtual_time=1e-7)
        recorder.timing(server_round, "round", 0.1)
        recorder.event("late", round=server_round, virtual_time=0.5, client="ä")


def test_row_and_schema_have_the_same_columns() -> None:
    assert list(Row._fields) == list(schema.METRIC_COLUMNS)


def test_parquet_has_the_documented_columns_types_and_exact_values(tmp_path: Path) -> None:
    values = [0.1 + 0.2, 1 / 3, 5e-324, 1.7976931348623157e308, -0.0, 1e22, 3.0]
    with Recorder(tmp_path) as recorder:
        for i, value in enumerate(values):
            recorder.row(**Row(i, i / 7, f"c{i}", i, i - 1, 2, "received", "accuracy", value)._asdict())
    frame = pd.read_parquet(tmp_path / "metrics.parquet")
    assert list(frame.columns) == ["round", "virtual_time", "client", "task", "after", "step", "phase", "name", "value"]
    assert [str(t) for t in frame.dtypes.drop(["client", "phase", "name"])] == [
        "int64",
        "float64",
        "int64",
        "int64",
        "int64",
        "float64",
    ]
    assert frame["value"].tolist() == values
    assert str(frame["value"][4]) == "-0.0"
    assert frame["virtual_time"].tolist() == [i / 7 for i in range(len(values))]
    assert frame["client"].tolist() == [f"c{i}" for i in range(len(values))]


def test_row_defaults_are_the_global_model_and_no_task(tmp_path: Path) -> None:
    with Recorder(tmp_path) as recorder:
        recorder.row(round=-1, phase="server", name="rank", value=np.float32(0.5), virtual_time=0.0)
    line = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert list(line.values()) == [-1, 0.0, "", -1, -1, -1, "server", "rank", 0.5]


def test_values_that_are_not_finite_become_missing(tmp_path: Path) -> None:
    with Recorder(tmp_path) as recorder:
        for value in (float("nan"), float("inf"), 1.0):
            recorder.row(round=0, phase="train", name="loss", value=value, virtual_time=0.0)
    assert [json.loads(line)["value"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [
        None,
        None,
        1.0,
    ]
    assert pd.read_parquet(tmp_path / "metrics.parquet")["value"].isna().tolist() == [True, True, False]


def test_converting_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    with Recorder(tmp_path) as recorder:
        # several of the blocks that the reader of the lines works in
        for i in range(30_000):
            recorder.row(round=i, phase="test", name="accuracy", value=i / 7, client=f"c{i % 13}", virtual_time=0.0)
    first = sha256(tmp_path / "metrics.parquet")
    again = tmp_path / "again.parquet"
    to_parquet(tmp_path / "metrics.jsonl", again, schema.METRIC_COLUMNS)
    assert sha256(again) == first
    assert pd.read_parquet(again)["value"].tolist() == [i / 7 for i in range(30_000)]


def test_a_run_resumed_from_its_offsets_equals_one_that_was_not_interrupted(tmp_path: Path) -> None:
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    for path in (whole, resumed):
        path.mkdir()
    with Recorder(whole) as recorder:
        write_rounds(recorder, range(6))
    recorder = Recorder(resumed)
    write_rounds(recorder, range(3))
    offsets = recorder.flush()
    assert offsets == {table: (resumed / f"{table}.jsonl").stat().st_size for table in schema.TABLES}
    write_rounds(recorder, range(3, 5))
    recorder.close()
    with (resumed / "metrics.jsonl").open("a") as file:
        file.write('{"round":5,"virt')  # torn by a dying process
    with Recorder(resumed, resume_offsets=offsets) as recorder:
        assert not (resumed / "metrics.parquet").exists()
        write_rounds(recorder, range(3, 6))
    assert sha256(resumed / "metrics.parquet") == sha256(whole / "metrics.parquet")
    assert (resumed / "events.jsonl").read_bytes() == (whole / "events.jsonl").read_bytes()
    assert len(pd.read_parquet(resumed / "timings.parquet")) == 6


def test_a_table_that_does_not_fit_its_offset_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    with Recorder(tmp_path) as recorder:
        write_rounds(recorder, range(3))
        offsets = recorder.flush()
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match=r"metrics.jsonl: has \d+ bytes, the checkpoint expects"):
        Recorder(tmp_path, resume_offsets=offsets | {"metrics": offsets["metrics"] + 1})
    with pytest.raises(ValueError, match="are not those of the checkpoint"):
        Recorder(tmp_path, resume_offsets=offsets | {"events": offsets["events"] - 1})
    with pytest.raises(ValueError, match="must name exactly"):
        Recorder(tmp_path, resume_offsets={"metrics": 0})
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_new_run_refuses_a_folder_with_tables(tmp_path: Path) -> None:
    with Recorder(tmp_path) as recorder:
        write_rounds(recorder, range(1))
    with pytest.raises(ValueError, match=r"already holds metrics\.jsonl"):
        Recorder(tmp_path)
    with pytest.raises(ValueError, match="existing folder"):
        Recorder(tmp_path / "missing")


def test_an_exception_leaves_flushed_lines_and_no_parquet(tmp_path: Path) -> None:
    def crash() -> None:
        with Recorder(tmp_path) as recorder:
            write_rounds(recorder, range(2))
            raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        crash()
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2
    assert not (tmp_path / "metrics.parquet").exists()


def test_closing_twice_is_harmless_and_an_empty_run_has_empty_tables(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path)
    recorder.close()
    recorder.close()
    assert pd.read_parquet(tmp_path / "metrics.parquet").shape == (0, 9)
    assert list(pd.read_parquet(tmp_path / "timings.parquet").columns) == ["round", "name", "seconds"]


def test_bad_rows_are_refused_by_name(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path)
    with pytest.raises(ValueError, match="phase='eval': must be one of train, test"):
        recorder.row(round=0, phase="eval", name="accuracy", value=1.0, virtual_time=0.0)
    with pytest.raises(ValueError, match="virtual_time=inf"):
        recorder.row(round=0, phase="test", name="accuracy", value=1.0, virtual_time=float("inf"))
    with pytest.raises(TypeError):
        recorder.event("fault", where=object(), round=-1, virtual_time=0.0)
    recorder.close()
    assert (tmp_path / "metrics.jsonl").stat().st_size == 0
    assert (tmp_path / "events.jsonl").stat().st_size == 0


def test_events_take_numpy_and_nested_fields(tmp_path: Path) -> None:
    with Recorder(tmp_path) as recorder:
        recorder.event(
            "fault", round=1, virtual_time=2.0, n=np.int64(3), norms=np.array([1.0, np.nan]), at={"a": (1, None)}
        )
    event = json.loads((tmp_path / "events.jsonl").read_text())
    assert event == {
        "round": 1, "virtual_time": 2.0, "kind": "fault", "n": 3, "norms": [1.0, None], "at": {"a": [1, None]},
    }  # fmt: skip


def test_summary_is_flat_ordered_and_refuses_unknown_keys(tmp_path: Path) -> None:
    with Recorder(tmp_path) as recorder:
        recorder.write_summary({"unlearning/mia": 0.5, "bwt": float("nan"), "accuracy/average": np.float64(0.25)})
        with pytest.raises(ValueError, match="accuracy/avrage"):
            recorder.write_summary({"accuracy/avrage": 1.0})
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert list(summary.items()) == [("accuracy/average", 0.25), ("bwt", None), ("unlearning/mia", 0.5)]


def test_small_files_are_replaced_whole(tmp_path: Path) -> None:
    with Recorder(tmp_path) as recorder:
        recorder.status("running")
        recorder.status("done")
        write_launch(tmp_path, "seed: 1\n", ["seed=1", 'data.root="a b"'], environment(1, "cpu"))
    assert (tmp_path / "STATUS").read_text() == "done\n"
    assert (tmp_path / "overrides.yaml").read_text() == '- "seed=1"\n- "data.root=\\"a b\\""\n'
    assert not list(tmp_path.glob(".*"))
    with pytest.raises(FileNotFoundError):
        write_atomic(tmp_path / "missing" / "file", "x")


def test_environment_says_what_bit_equality_depends_on() -> None:
    import torch

    env = environment(7, "cpu")
    assert env["seed"] == 7
    assert env["packages"]["torch"] == torch.__version__
    assert env["threads"]["torch"] == torch.get_num_threads()
    assert env["cpu"]
    json.dumps(env)


def test_run_dir_by_default_is_new_each_time_and_named_by_config_and_seed(tmp_path: Path) -> None:
    first = create_run_dir(None, "demo", config="a: 1", seed=5, root=tmp_path)
    second = create_run_dir(None, "demo", config="a: 1", seed=5, root=tmp_path)
    digest = hashlib.sha256(b"a: 1").hexdigest()[:8]
    assert first != second
    for path in (first, second):
        assert path.is_dir()
        assert path.parent == tmp_path / "demo"
        assert f"_{digest}_s5" in path.name


def test_run_dir_refuses_what_is_not_new(tmp_path: Path) -> None:
    assert create_run_dir(tmp_path / "a" / "b", "demo").is_dir()
    assert create_run_dir(tmp_path / "a" / "b", "demo").is_dir()  # empty is as good as new
    (tmp_path / "a" / "b" / "file").write_text("x")
    with pytest.raises(ValueError, match=r"must be new or empty.*fedcl resume") as error:
        create_run_dir(tmp_path / "a" / "b", "demo")
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="is a file"):
        create_run_dir(tmp_path / "a" / "b" / "file", "demo")


@pytest.mark.parametrize("name", ["", "a/b", "..", ".", "a b", "ä", "a\n"])
def test_run_dir_refuses_names_that_are_no_plain_folder(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="name="):
        create_run_dir(None, name, root=tmp_path)
    assert not list(tmp_path.iterdir())


def test_recording_needs_neither_pandas_nor_matplotlib_nor_pyarrow() -> None:
    code = (
        "import sys; sys.modules.update(dict.fromkeys(['pandas', 'matplotlib', 'pyarrow', 'yaml', 'rich', 'ray']))\n"
        "import tempfile, pathlib, fedcl.results, fedcl.results.progress\n"
        "r = fedcl.results.Recorder(pathlib.Path(tempfile.mkdtemp()))\n"
        "r.row(round=0, phase='test', name='accuracy', value=1.0, virtual_time=0.0); assert r.flush()['metrics'] > 0"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])
