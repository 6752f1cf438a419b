from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fedcl.client.device_state import KEEP_RUNS, KEEP_VISITS, DeviceStateStore
from fedcl.client.file_state import StateDamaged

NOTE = '{"classes": ["a"], "input_shape": [2], "local": true}'


def store_of(tmp_path: Path, run: str = "run-1") -> DeviceStateStore:
    return DeviceStateStore(tmp_path, run, "alice")


def stage(store: DeviceStateStore, visit: int) -> None:
    store.stage("alice", visit, {"n": visit, "t": torch.full((3,), float(visit))})


def visits(tmp_path: Path, run: str = "run-1") -> list[int]:
    return sorted(int(f.stem.split("_")[1]) for f in (tmp_path / run / "alice").glob("visit_*.safetensors"))


def test_state_survives_a_new_process_and_is_checked(tmp_path: Path) -> None:
    stage(store_of(tmp_path), 4)
    again = store_of(tmp_path)
    again.commit("alice", 4)
    assert again.load("alice", 4)["n"] == 4
    file = tmp_path / "run-1" / "alice" / "visit_4.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(StateDamaged):
        again.load("alice", 4)


def test_only_the_newest_committed_states_stay(tmp_path: Path) -> None:
    store = store_of(tmp_path)
    for visit in range(12):
        stage(store, visit)
        store.commit("alice", visit)
    assert visits(tmp_path) == list(range(11 - KEEP_VISITS, 12))


def test_a_message_that_names_an_unknown_state_erases_nothing(tmp_path: Path) -> None:
    store = store_of(tmp_path)
    stage(store, 3)
    store.commit("alice", 99)
    store.commit("alice", -1)
    assert visits(tmp_path) == [3]
    with pytest.raises(KeyError):
        store.load("alice", 99)


def test_no_state_from_before_a_forgetting_stays_once_it_counts(tmp_path: Path) -> None:
    store = store_of(tmp_path)
    for visit in range(4):
        stage(store, visit)
    store.forgot(3)
    store.commit("alice", 2)
    assert visits(tmp_path) == [0, 1, 2, 3]
    store.commit("alice", 3)
    assert visits(tmp_path) == [3]


def test_repeated_and_outdated_messages_are_refused(tmp_path: Path) -> None:
    store = store_of(tmp_path)
    store.enter(0, 0)
    store.enter(0, 1)
    with pytest.raises(ValueError, match="visit 1 was here before"):
        store_of(tmp_path).enter(0, 1)
    with pytest.raises(ValueError, match="visit 0 was here before"):
        store.enter(0, 0)
    store.enter(1, 1)  # a resumed server sends again what was in flight
    with pytest.raises(ValueError, match="attempt 0, the run at 1"):
        store.enter(0, 7)


def test_a_client_that_leaves_takes_everything_along(tmp_path: Path) -> None:
    for run in ("run-0", "run-1"):
        stage(store_of(tmp_path, run), 0)
    store = store_of(tmp_path)
    store.drop("alice")
    assert not list(tmp_path.rglob("*.safetensors"))
    with pytest.raises(ValueError, match="has left this run"):
        store.enter(0, 1)
    store_of(tmp_path, "run-2").enter(0, 0)  # another run may ask again


def test_runs_keep_apart_and_old_ones_make_room(tmp_path: Path) -> None:
    for i in range(KEEP_RUNS + 2):
        store = store_of(tmp_path, f"run-{i}")
        store.agree(NOTE)
        stage(store, 0)
    assert len(list(tmp_path.iterdir())) == KEEP_RUNS
    assert (tmp_path / f"run-{KEEP_RUNS + 1}").is_dir()


def test_what_was_agreed_on_cannot_change_within_a_run(tmp_path: Path) -> None:
    store = store_of(tmp_path)
    with pytest.raises(ValueError, match="has never said hello"):
        store.agreed()
    store.agree(NOTE)
    store.agree(NOTE)
    with pytest.raises(ValueError, match="other classes"):
        store.agree(NOTE.replace("a", "b"))


@pytest.mark.parametrize("run", ["", "../up", "a/b", ".hidden", "x" * 65])
def test_a_run_cannot_name_a_path(tmp_path: Path, run: str) -> None:
    with pytest.raises(ValueError, match="run="):
        store_of(tmp_path, run)
