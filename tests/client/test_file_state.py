from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fedcl.base.tree import equal
from fedcl.client.file_state import FileStateStore, StateDamaged
from fedcl.client.state import NEVER, MemoryStateStore

Store = MemoryStateStore | FileStateStore
NAUGHTY = ["", ".", "..", "../a", "a/b", "/etc", "a\\b", "a\n", "a b", "ä", "a\x00", "~/a", "x" * 129]
LINUX = pytest.mark.skipif(sys.platform == "win32", reason="needs fork, signals and resource limits")


def full_state() -> dict[str, object]:
    shared = torch.arange(6.0).reshape(2, 3)
    return {
        "weights": {"a.b": shared, "again": shared, "part": shared[:, 1], "empty": torch.zeros(0, 3)},
        "kinds": [torch.tensor(1, dtype=torch.int64), torch.tensor([True]), torch.ones(2, dtype=torch.bfloat16)],
        "values": [1, 0.1 + 0.2, -0.0, float("inf"), None, True, 'ü "sha256":"x"', 2**80, {}, []],
    }


@pytest.fixture(params=["memory", "file"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    return MemoryStateStore() if request.param == "memory" else FileStateStore(tmp_path / "deep" / "states")


# --- what every store promises


def test_a_client_never_visited_has_an_empty_state(store: Store) -> None:
    assert store.load("a", NEVER) == {}
    assert store.has("a", NEVER)
    with pytest.raises(KeyError):
        store.load("a", 0)


def test_every_kind_of_value_comes_back(store: Store) -> None:
    store.stage("a", 0, full_state())
    assert equal(store.load("a", 0), full_state())
    store.stage("a", 1, {})
    assert store.load("a", 1) == {}


def test_staged_beside_committed_until_the_server_decides(store: Store) -> None:
    store.stage("a", 0, {"n": 0})
    store.commit("a", 0)
    store.stage("a", 1, {"n": 1})
    store.stage("a", 12, {"n": 12})
    assert [store.load("a", visit)["n"] for visit in (0, 1, 12)] == [0, 1, 12]
    store.commit("a", 1)
    assert store.load("a", 1) == {"n": 1}
    for gone in (0, 12):
        assert not store.has("a", gone)
        with pytest.raises(KeyError):
            store.load("a", gone)


def test_a_retry_replaces_what_the_first_try_staged(store: Store) -> None:
    store.stage("a", 3, {"n": torch.zeros(100)})
    store.stage("a", 3, {"n": 2})
    store.commit("a", 3)
    assert store.load("a", 3) == {"n": 2}


def test_committing_twice_changes_nothing(store: Store) -> None:
    store.stage("a", 0, {"n": 0})
    store.commit("a", 0)
    store.stage("a", 1, {"n": 1})
    store.commit("a", 0)
    store.commit("a", 0)
    assert store.load("a", 0) == {"n": 0}
    assert not store.has("a", 1)


def test_committing_a_visit_that_is_not_here_drops_what_is_outdated(store: Store) -> None:
    for visit in (5, NEVER):
        store.stage("a", 0, {"n": 0})
        store.commit("a", visit)
        assert not store.has("a", 0)
    store.commit("b", 0)
    assert not store.has("b", 0)


def test_clients_do_not_share_and_can_be_dropped(store: Store) -> None:
    for client in ("a", "b", "a.b", "...", "-"):
        store.stage(client, 0, {"n": client})
    store.drop("a")
    store.drop("never-seen")
    assert not store.has("a", 0)
    assert store.has("a", NEVER)
    assert [store.load(client, 0)["n"] for client in ("b", "a.b", "...", "-")] == ["b", "a.b", "...", "-"]


# --- what files add


def test_a_second_store_on_the_folder_finds_everything_and_drop_leaves_nothing(tmp_path: Path) -> None:
    FileStateStore(tmp_path).stage("a", 4, full_state())
    again = FileStateStore(tmp_path)
    assert equal(again.load("a", 4), full_state())
    if os.name == "posix":
        assert (tmp_path / "a").stat().st_mode & 0o077 == 0
    (tmp_path / "a" / ".half.tmp").write_bytes(b"private")
    again.drop("a")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("client", NAUGHTY)
def test_an_id_that_is_no_name_is_refused_before_the_disk_is_touched(client: str, tmp_path: Path) -> None:
    store = FileStateStore(tmp_path / "states")
    calls: list[Callable[[], object]] = [
        lambda: store.load(client, 0),
        lambda: store.load(client, NEVER),
        lambda: store.stage(client, 0, {}),
        lambda: store.commit(client, 0),
        lambda: store.has(client, 0),
        lambda: store.drop(client),
    ]
    for call in calls:
        with pytest.raises(ValueError, match="must be 1 to 128 of A-Z a-z 0-9"):
            call()
    assert list(tmp_path.iterdir()) == []


def test_a_link_out_of_the_folder_is_not_followed(tmp_path: Path) -> None:
    elsewhere, states = tmp_path / "elsewhere", tmp_path / "states"
    FileStateStore(elsewhere).stage("b", 0, {"n": 1})
    states.mkdir()
    (states / "a").symlink_to(elsewhere / "b", target_is_directory=True)
    (states / "c").mkdir()
    (states / "c" / "visit_0.safetensors").symlink_to(elsewhere / "b" / "visit_0.safetensors")
    store = FileStateStore(states)
    for client in ("a", "c"):
        for call in (lambda c: store.load(c, 0), lambda c: store.stage(c, 0, {})):
            with pytest.raises(ValueError, match="leads out of the client's folder"):
                call(client)
    with pytest.raises(ValueError, match="leads out"):
        store.drop("a")
    store.drop("c")
    assert FileStateStore(elsewhere).load("b", 0) == {"n": 1}


def test_the_store_itself_may_lie_behind_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real", target_is_directory=True)
    FileStateStore(tmp_path / "link").stage("a", 0, {"n": 1})
    assert FileStateStore(tmp_path / "real").load("a", 0) == {"n": 1}


def test_every_changed_bit_and_every_cut_is_noticed(tmp_path: Path) -> None:
    store = FileStateStore(tmp_path)
    store.stage("a", 7, {"x": torch.arange(3.0), "n": 1})
    path = tmp_path / "a" / "visit_7.safetensors"
    whole = path.read_bytes()
    for position in range(len(whole)):
        changed = bytearray(whole)
        changed[position] ^= 1 << (position % 8)
        path.write_bytes(changed)
        with pytest.raises(StateDamaged, match=r"client a, visit 7: .*visit_7\.safetensors"):
            store.load("a", 7)
        path.write_bytes(whole[:position])
        with pytest.raises(StateDamaged, match="client a, visit 7"):
            store.load("a", 7)
    path.write_bytes(whole + b"\0")
    with pytest.raises(StateDamaged):
        store.load("a", 7)
    path.write_bytes(whole)
    assert equal(store.load("a", 7), {"x": torch.arange(3.0), "n": 1})


def test_a_file_of_another_client_or_visit_is_refused(tmp_path: Path) -> None:
    store = FileStateStore(tmp_path)
    store.stage("a", 1, {"n": 1})
    store.stage("b", 1, {"n": 2})
    (tmp_path / "a" / "visit_1.safetensors").rename(tmp_path / "b" / "visit_1.safetensors")
    with pytest.raises(StateDamaged, match=r"client b, visit 1: .* is of client a, visit 1"):
        store.load("b", 1)
    (tmp_path / "b" / "visit_1.safetensors").rename(tmp_path / "a" / "visit_2.safetensors")
    with pytest.raises(StateDamaged, match=r"client a, visit 2: .* is of client a, visit 1"):
        store.load("a", 2)


def test_a_pickle_is_not_opened(tmp_path: Path) -> None:
    store = FileStateStore(tmp_path)
    store.stage("a", 0, {})
    torch.save({"n": torch.ones(1)}, tmp_path / "a" / "visit_0.safetensors")
    with pytest.raises(StateDamaged, match="holds no hash"):
        store.load("a", 0)


def test_what_cannot_be_stored_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    store = FileStateStore(tmp_path)
    with pytest.raises(TypeError, match="cannot be stored"):
        store.stage("a", 0, {"f": object()})
    with pytest.raises(ValueError, match="visit=-1: must be >= 0"):
        store.stage("a", NEVER, {})
    assert list(tmp_path.iterdir()) == []


def test_commit_removes_what_a_killed_process_left_and_spares_a_living_one(tmp_path: Path) -> None:
    store = FileStateStore(tmp_path)
    store.stage("a", 0, {"n": 0})
    old, young = tmp_path / "a" / ".visit_1.safetensors.old.tmp", tmp_path / "a" / ".visit_1.safetensors.young.tmp"
    for path in (old, young):
        path.write_bytes(b"half")
    os.utime(old, (0, 0))
    store.commit("a", 0)
    assert not old.exists()
    assert young.exists()
    assert store.load("a", 0) == {"n": 0}


# --- processes


def python(code: str, folder: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


KILLED = """
import os, random, signal, sys, time
from pathlib import Path
import torch
from fedcl.client.file_state import FileStateStore

def state(visit):
    return {"visit": visit, "x": torch.full((100_000,), float(visit))}

store = FileStateStore(Path(sys.argv[1]))
draws = random.Random(0)
last, torn, kills = -1, 0, 0
while kills < 25 or (not torn and kills < 500):  # until one falls into a write
    kills += 1
    ours, theirs = os.pipe()
    child = os.fork()
    if child == 0:
        visit = last
        while True:
            visit += 1
            store.stage("a", visit, state(visit))
            os.write(theirs, b"s%d\\n" % visit)
            store.commit("a", visit)
            os.write(theirs, b"c%d\\n" % visit)
    os.close(theirs)
    pipe = os.fdopen(ours)
    first = [pipe.readline().strip() for _ in range(2)]  # one state is committed, however slow the disk
    time.sleep(draws.uniform(0.0, 0.02))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    with pipe:
        said = first + pipe.read().split()
    committed = [int(word[1:]) for word in said if word[0] == "c"]
    staged = [int(word[1:]) for word in said if word[0] == "s"]
    before, last = last, committed[-1] if committed else last
    if staged and staged[-1] > last:
        # Killed while it committed: the new state is whole, and may or may not be alone already.
        last = staged[-1]
    if last >= 0:
        loaded = store.load("a", last)
        assert loaded["visit"] == last and bool((loaded["x"] == last).all())
    for path in Path(sys.argv[1]).glob("a/visit_*"):
        visit = int(path.stem.removeprefix("visit_"))
        assert store.load("a", visit)["visit"] == visit
    torn += len(list(Path(sys.argv[1]).glob("a/.*.tmp")))
print(last, torn)
"""


@LINUX
def test_a_process_killed_at_any_moment_leaves_the_committed_state_whole(tmp_path: Path) -> None:
    last, torn = map(int, python(KILLED, tmp_path).split())
    assert last > 0
    assert torn > 0, "no kill fell into a write: the delays do not test anything"


FULL_DISK = """
import json, os, resource, sys
from pathlib import Path
import torch
from fedcl.client.file_state import FileStateStore
from fedcl.base.files import write_atomic

folder = Path(sys.argv[1])
store = FileStateStore(folder)
store.stage("a", 0, {"n": 0})
store.commit("a", 0)
store.stage("a", 1, {"n": 1})
write_atomic(folder / "text", "old")
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
errors = []
for write in (
    lambda: store.stage("a", 1, {"x": torch.ones(10_000)}),
    lambda: store.stage("a", 2, {"x": torch.ones(10_000)}),
    lambda: write_atomic(folder / "text", "new" * 10_000),
):
    try:
        write()
    except OSError as error:
        errors.append(error.strerror)
print(json.dumps(errors))
"""


@LINUX
def test_a_full_disk_is_an_error_and_the_old_state_stays(tmp_path: Path) -> None:
    errors = json.loads(python(FULL_DISK, tmp_path))
    assert len(errors) == 3, errors
    store = FileStateStore(tmp_path)
    assert store.load("a", 0) == {"n": 0}
    assert store.load("a", 1) == {"n": 1}
    assert not store.has("a", 2)
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["visit_0.safetensors", "visit_1.safetensors"]
    assert (tmp_path / "text").read_text() == "old"


TWO_WRITERS = """
import os, sys
from pathlib import Path
import torch
from fedcl.client.file_state import FileStateStore

def write(mine):
    store = FileStateStore(Path(sys.argv[1]))
    for visit in range(60):
        store.stage("a", visit, {"who": mine, "x": torch.full((20_000 + mine,), float(mine))})
        store.commit("a", visit)
        store.stage("same", 0, {"who": mine, "x": torch.full((20_000 + mine,), float(mine))})
        seen = store.load("same", 0)
        assert bool((seen["x"] == seen["who"]).all()) and len(seen["x"]) == 20_000 + seen["who"]

children = []
for mine in (1, 2):
    child = os.fork()
    if child == 0:
        status = 1
        try:
            write(mine)
            status = 0
        finally:
            os._exit(status)
    children.append(child)
assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0, 0]
"""


@LINUX
def test_two_processes_on_one_folder_do_not_tear_each_others_states(tmp_path: Path) -> None:
    python(TWO_WRITERS, tmp_path)
    store = FileStateStore(tmp_path)
    who = store.load("same", 0)["who"]
    assert equal(store.load("same", 0)["x"], torch.full((20_000 + who,), float(who)))
    assert not list(tmp_path.rglob("*.tmp"))
    for path in (tmp_path / "a").iterdir():
        store.load("a", int(path.stem.removeprefix("visit_")))
