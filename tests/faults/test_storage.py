"""Disks that are full, folders that cannot be written, files that were changed, links and names that lead elsewhere."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from fedcl.cli import main
from fedcl.results import load
from fedcl.results.checkpoint import CheckpointError, Checkpoints
from fedcl.results.environment import create_run_dir
from fedcl.results.progress import Progress
from fedcl.runs.experiment import resume

RunExperiment = Callable[..., Path]
Hash = Callable[[Path], str]
ROOT = Path(__file__).resolve().parents[2]
SMALL = ["num_clients=3", "rounds_per_task=1", "scenario.num_tasks=5", "strategy/projection=none", "learner=er"]
SMALL += ["checkpoint.min_seconds=0"]
RUN = ["run", "--quiet", "backend=inline", "compare_with=null", "figures=false", *SMALL]


# -- a full disk ------------------------------------------------------------------------------------------------------

FULL_DISK = """
import json, resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
from fedcl.results.checkpoint import Checkpoints
limit = int(sys.argv[1])
save = Checkpoints.save

def save_then_shrink(self, server_round, *args, **kwargs):
    if server_round == 2:  # from here on no file may grow beyond the limit, as if that were all the room there is
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    save(self, server_round, *args, **kwargs)

Checkpoints.save = save_then_shrink
from fedcl.cli import main
sys.exit(main(json.loads(sys.argv[2])))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits the size of files as Linux does")
@pytest.mark.parametrize("limit", [pytest.param(300, marks=pytest.mark.slow), 6000], ids=["tables", "checkpoint"])
def test_a_full_disk_stops_the_run_and_leaves_what_was_whole(
    limit: int, tmp_path: Path, run_experiment: RunExperiment, metrics_hash: Hash
) -> None:
    folder = tmp_path / "full"
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(limit), json.dumps([*RUN, f"run_dir={folder}"])],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 1
    assert "fedcl: error: File too large" in done.stderr
    assert "fedcl resume" in done.stderr
    assert "Traceback" not in done.stderr
    assert (folder / "STATUS").read_text() == "failed\n"
    checkpoints = folder / "checkpoints"
    assert (checkpoints / "LATEST").read_text() == "round_000001\n"
    assert {path.name for path in checkpoints.glob("round_*")} == {"round_000000", "round_000001"}
    assert not (folder / "metrics.parquet").exists()
    for file in (checkpoints / "clients").glob("*.safetensors"):  # a final name is a whole file
        assert hashlib.sha256(file.read_bytes()).hexdigest() == file.stem
    resume(folder, force=False, quiet=True)
    assert load(folder).status == "done"
    assert metrics_hash(folder) == metrics_hash(run_experiment("whole", *SMALL))


def test_a_checkpoint_holds_a_model_that_messages_in_flight_still_start_from(
    run_experiment: RunExperiment, metrics_hash: Hash, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # nobody is back when the first rounds close, so what was sent is still the global model
    slow = [*SMALL, "rounds_per_task=4", "scenario.num_tasks=2", "devices=homogeneous", "devices.latency=1.0"]
    slow += ["async.deadline=0.3", "async.finished_task=keep"]
    whole = run_experiment("whole", *slow)
    skipped = load(whole).events.query("kind == 'round_skipped'")["round"].tolist()
    assert skipped[:3] == [0, 1, 2]
    assert len(skipped) < 8

    def stop(self: Progress, done: int, *args: object) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Progress, "update", stop)
        with pytest.raises(KeyboardInterrupt):
            run_experiment("cut", *slow)
    assert (tmp_path / "cut" / "checkpoints" / "LATEST").read_text() == "round_000001\n"
    resume(tmp_path / "cut", force=False, quiet=True)
    assert metrics_hash(tmp_path / "cut") == metrics_hash(whole)


# -- folders that cannot be written -----------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["file", "file/below", "file/far/below", "dangling/run", "full"])
def test_a_folder_that_cannot_be_written_is_refused_before_anything_runs(
    place: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("mine")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere" / "at" / "all")

    def never(*args: object, **kwargs: object) -> None:
        raise AssertionError("the run has begun")

    monkeypatch.setattr("fedcl.runs.experiment.run_session", never)
    assert main([*RUN, f"run_dir={tmp_path / place}"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "run_dir" in error
    assert str(tmp_path / place.split("/")[0]) in error
    assert (tmp_path / "file").read_text() == "mine"
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["thesis.tex"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder_is_refused_before_anything_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    assert main([*RUN, f"run_dir={tmp_path / 'locked' / 'run'}"]) == 2
    assert "run_dir" in capsys.readouterr().err


READ_ONLY = """
import json, sys
from fedcl.cli import main
from fedcl.results.html import page
page.draw_all = lambda run: ([], {})  # pictures take longer than all the rest
for words in json.loads(sys.argv[1]):
    print("status", main(words), flush=True)
"""
_BIND = 'mount --bind "$0" "$0" && mount -o remount,bind,ro "$0" && exec "$@"'


@pytest.mark.skipif(
    shutil.which("unshare") is None
    or subprocess.run(["unshare", "-rm", "true"], capture_output=True, check=False).returncode != 0,
    reason="mounts a folder read-only, in a name space of its own",
)
def test_a_read_only_folder_is_looked_at_and_otherwise_refused(finished: Path, tmp_path: Path) -> None:
    """Root, too, writes to nothing that is mounted read-only."""
    run, before = str(finished), {path: path.stat().st_mtime_ns for path in finished.rglob("*")}
    looking = [["compare", run], ["export", run, "--out", str(tmp_path / "model")]]
    refused = {
        "report.html": ["report", run],
        "SHA256SUMS": ["resume", run, "--quiet", "--force"],
        "config.yaml": ["forget", run, "--class", "1"],
        "model.safetensors": ["export", run],
        "new": [*RUN, f"run_dir={run}/new"],
        "longer": ["extend", run, "--quiet", "scenario.num_tasks=5", "rounds_per_task=2", f"run_dir={run}/longer"],
    }
    script = [sys.executable, "-c", READ_ONLY, json.dumps([*looking, *refused.values()])]
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", _BIND, run, *script],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    statuses = [line for line in done.stdout.splitlines() if line.startswith("status")]
    assert statuses == ["status 0"] * 2 + ["status 2"] * len(refused), done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("fedcl: error")]
    assert len(errors) == len(refused)
    assert [error for error in errors if run not in error] == []
    assert "Traceback" not in done.stderr
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*")} == before


# -- changed files ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def played(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("storage") / "run"
    assert main([*RUN, f"run_dir={folder}"]) == 0
    return folder


@pytest.fixture
def finished(played: Path, tmp_path: Path) -> Path:
    """Return the folder of a finished run, a copy of the test's own."""
    return Path(shutil.copytree(played, tmp_path / "run"))


def _newest(folder: Path) -> Path:
    return folder / "checkpoints" / (folder / "checkpoints" / "LATEST").read_text().strip()


def _newest_client(folder: Path) -> Path:
    clients = json.loads((_newest(folder) / "state.json").read_text())["clients"]
    older = json.loads((_newest(folder).with_name("round_000003") / "state.json").read_text())["clients"]
    [digest, *_] = {digest for _, digest in clients.values()} - {digest for _, digest in older.values()}
    return folder / "checkpoints" / "clients" / f"{digest}.safetensors"


@pytest.mark.parametrize("member", ["SHA256SUMS", "state.json", "tensors.safetensors", "client"])
@pytest.mark.parametrize("where", [0.0, 0.4, 0.99])
def test_a_flipped_bit_anywhere_in_a_checkpoint_falls_back_to_the_one_before(
    member: str, where: float, finished: Path
) -> None:
    file = _newest_client(finished) if member == "client" else _newest(finished) / member
    data = bytearray(file.read_bytes())
    data[int(where * len(data))] ^= 1
    file.write_bytes(data)
    with pytest.warns(UserWarning, match="round_000004 is damaged"):
        state, clients = Checkpoints(finished).load()
    assert state["server"]["next_round"] == 4
    assert clients


@pytest.mark.parametrize("table", ["metrics", "timings", "events"])
def test_a_bit_of_a_table_that_a_run_would_go_on_with_is_noticed(
    table: str, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In a run that is not done, a number that is still a number: only a hash can tell."""
    (finished / "STATUS").write_text("running\n")
    (finished / "SHA256SUMS").unlink()
    for parquet in finished.glob("*.parquet"):
        parquet.unlink()
    path = finished / f"{table}.jsonl"
    data = path.read_bytes()
    at = next(i for i in range(len(data) // 2, len(data)) if data[i : i + 1] in b"2345678")
    path.write_bytes(data[:at] + b"9" + data[at + 1 :])
    assert main(["resume", str(finished)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert f"{path}: its first" in error
    assert "fedcl resume then starts the run again" in error
    assert path.read_bytes() == data[:at] + b"9" + data[at + 1 :]


@pytest.mark.parametrize("name", ["summary.json", "metrics.parquet", "timings.parquet"])
def test_what_can_be_made_again_is(name: str, finished: Path) -> None:
    before = (finished / name).read_bytes()
    (finished / name).write_bytes(before.replace(b"1", b"2", 1))
    assert main(["resume", str(finished), "--quiet"]) == 0
    assert (finished / name).read_bytes() == before


@pytest.mark.parametrize("text", ["", "round_000099\n", "../../elsewhere\n", "/etc\n", "round_000004/../..\n"])
def test_a_changed_latest_leads_to_a_whole_checkpoint_of_this_run(text: str, finished: Path) -> None:
    (finished / "checkpoints" / "LATEST").write_text(text)
    state, _ = Checkpoints(finished).load()
    assert state["server"]["next_round"] == 5


# -- pickles, links and names -----------------------------------------------------------------------------------------


class Bomb:
    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> object:
        return (open, (self.path, "w"))


def _resign(folder: Path, member: str, data: bytes) -> None:
    """Put ``data`` into the newest checkpoint with a hash that fits, as somebody with bad intentions would."""
    (_newest(folder) / member).write_bytes(data)
    sums = "".join(
        f"{hashlib.sha256((_newest(folder) / name).read_bytes()).hexdigest()}  {name}\n"
        for name in ("state.json", "tensors.safetensors")
    )
    (_newest(folder) / "SHA256SUMS").write_text(sums)


@pytest.mark.parametrize("how", ["pickle", "torch.save"])
@pytest.mark.parametrize("member", ["state.json", "tensors.safetensors", "client"])
def test_a_pickle_in_a_checkpoint_is_not_opened(member: str, how: str, finished: Path, tmp_path: Path) -> None:
    bomb = {"server": Bomb(tmp_path / "exploded")}
    source = tmp_path / "bomb"
    if how == "pickle":
        source.write_bytes(pickle.dumps(bomb))
    else:
        torch.save(bomb, source)
    data = source.read_bytes()
    if member == "client":
        digest = hashlib.sha256(data).hexdigest()
        (finished / "checkpoints" / "clients" / f"{digest}.safetensors").write_bytes(data)
        header = json.loads((_newest(finished) / "state.json").read_text())
        header["clients"]["0"][1] = digest
        _resign(finished, "state.json", json.dumps(header).encode())
    else:
        _resign(finished, member, data)
    with pytest.warns(UserWarning, match="round_000004 is damaged"):
        Checkpoints(finished).load()
    assert not (tmp_path / "exploded").exists()


def test_a_pickle_as_data_is_not_opened(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    objects = np.array([Bomb(tmp_path / "exploded")], dtype=object)
    np.savez(tmp_path / "data.npz", x_train=objects, y_train=objects, x_test=objects, y_test=objects)
    assert main([*RUN, "data=npz", f"data.root={tmp_path / 'data.npz'}", f"run_dir={tmp_path / 'run'}"]) == 2
    assert "data.npz" in capsys.readouterr().err
    assert not (tmp_path / "exploded").exists()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["../up", "/abs", "a/b", "..", "a b", ""])
def test_a_runs_name_is_no_path(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="name="):
        create_run_dir(None, name, root=tmp_path / "runs")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["../up", "/abs", "a/b", "..", ".hidden", "-rf", "a b", ""])
def test_a_configured_name_is_no_path(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([*RUN, f"name='{name}'"]) == 2
    assert "name=" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("member", ["../state.json", "/etc/passwd", "state.json/../../../secret", "extra.json"])
def test_a_checkpoint_names_no_file_but_its_own(member: str, finished: Path) -> None:
    sums = _newest(finished) / "SHA256SUMS"
    sums.write_text(sums.read_text().replace("state.json", member))
    with pytest.warns(UserWarning, match="foreign file"):
        state, _ = Checkpoints(finished).load()
    assert state["server"]["next_round"] == 4


@pytest.mark.parametrize("digest", ["../../../secret", "/etc/passwd", "a" * 63, "A" * 64])
def test_a_checkpoint_names_no_client_file_but_by_its_hash(digest: str, finished: Path) -> None:
    header = json.loads((_newest(finished) / "state.json").read_text())
    header["clients"]["0"][1] = digest
    _resign(finished, "state.json", json.dumps(header).encode())
    with pytest.warns(UserWarning, match="foreign client file"):
        Checkpoints(finished).load()


@pytest.mark.parametrize("member", ["state.json", "client", "folder"])
def test_a_link_out_of_the_checkpoints_changes_nothing_elsewhere(member: str, finished: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    link = {
        "state.json": _newest(finished) / "state.json",
        "client": _newest_client(finished),
        "folder": finished / "checkpoints" / "round_000009",
    }[member]
    if member == "folder":
        link.symlink_to(outside, target_is_directory=True)
    else:
        (outside / "foreign").write_bytes(b"not what was written")
        link.unlink()
        link.symlink_to(outside / "foreign")
    kept = {path.name: path.read_bytes() for path in outside.iterdir()}
    checkpoints = Checkpoints(finished)
    if member == "folder":
        state, clients = checkpoints.load()  # newer than LATEST: not looked at
    else:
        with pytest.warns(UserWarning, match="damaged"):
            state, clients = checkpoints.load()
    assert state["server"]["next_round"] in (4, 5)
    versions = {client: visit for client, (visit, _) in clients.items()}
    states = {client: saved for client, (_, saved) in clients.items()}
    for server_round in (10, 11, 12):  # writing and pruning follow no link either
        Checkpoints(finished).save(server_round, state, versions, lambda client, visit: states[client])
    assert {path.name: path.read_bytes() for path in outside.iterdir()} == kept


def test_where_no_checkpoint_is_left_resume_is_bad_input(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (finished / "STATUS").write_text("running\n")
    for folder in (finished / "checkpoints").glob("round_*"):
        shutil.rmtree(folder)
    with pytest.raises(CheckpointError):
        Checkpoints(finished).load()
    assert main(["resume", str(finished)]) == 2
    assert "no whole checkpoint" in capsys.readouterr().err
