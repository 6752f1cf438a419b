"""Nothing of a client that was forgotten is left: its samples carry a mark, which is looked for everywhere."""

from __future__ import annotations

import io
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedcl.assembly import load_dataset, split_dataset
from fedcl.cli import main
from fedcl.config.compose import compose
from fedcl.results import load
from fedcl.runs.experiment import run
from fedcl.server.loop import Server
from fedcl.simulation.grid import BaseGrid
from fedcl.unlearning.certificate import Certification
from fedcl.unlearning.service import Unlearning

MARK = bytes(range(201, 217)) + bytes(range(240, 256))  # in every image that client 1 holds, twice
MARKED = "1"
SMALL = ["compare_with=null", "figures=false", "num_clients=4", "scenario.num_tasks=2", "rounds_per_task=2"]
SMALL += ["scenario=class_incremental", "data=npz", "data/partition=iid", "strategy/projection=none", "learner=er"]
SMALL += ["learner.er.budget=30", "checkpoint.min_seconds=0", "client.epochs=1", "client.batch_size=8", "model=mlp"]
RAW = np.frombuffer(MARK, dtype=np.uint8)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of four classes; those that are client 1's bear the mark. It is uint8, and so is what ER keeps of it."""
    path = tmp_path_factory.mktemp("data") / "marked.npz"
    rng = np.random.default_rng(0)
    y = np.tile(np.arange(4, dtype=np.uint8), 40)
    x = rng.integers(0, 200, (len(y), 8, 8), dtype=np.uint8)
    np.savez(path, x_train=x, y_train=y, x_test=x[:16], y_test=y[:16])
    cfg = compose([*SMALL, f"data.root={path}"])
    partition = split_dataset(cfg, load_dataset(cfg))
    flat = x.reshape(len(y), 64)
    flat[partition.train[int(MARKED)], :32] = RAW
    np.savez(path, x_train=x, y_train=y, x_test=x[:16] % 200, y_test=y[:16])
    return path


def _settings(data: Path, folder: Path, *overrides: str) -> list[str]:
    return [*SMALL, f"data.root={data}", f"run_dir={folder}", *overrides]


def _bears(data: bytes) -> bool:
    """Whether bytes hold the mark: as it is, or as the floats that pictures are turned into."""
    floats = RAW.astype(np.float32)
    return any(pattern in data for pattern in (MARK, floats.tobytes(), (floats / np.float32(255)).tobytes()))


def _files_with_mark(folder: Path) -> list[str]:
    return [str(p.relative_to(folder)) for p in sorted(folder.rglob("*")) if p.is_file() and _bears(p.read_bytes())]


def _pickled(thing: Any) -> bytes:
    """Return the bytes of an object's tensors and text as they are: torch's own pickling keeps raw storages whole."""
    out = io.BytesIO()
    torch.save(thing, out, pickle_module=pickle, _use_new_zipfile_serialization=False)
    return out.getvalue()


@pytest.fixture
def stores(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, bool]]:
    """Look into everything alive of the grid before a request is served and after: (moment, whether it bears the mark).

    Before the last round it must have been there, or the search would prove nothing.
    """
    seen: list[tuple[str, bool]] = []
    serve, served = Unlearning._process, Certification.__call__

    def grid_of(server: Server) -> Any:
        grid = server.exchange.grid
        assert isinstance(grid, BaseGrid)
        return grid

    def look(server: Server, moment: str) -> None:
        grid = grid_of(server)
        parts = [grid.states, grid._done, grid._sent, getattr(grid, "_queue", None), server.state_dict()]
        host = getattr(grid, "_host", None)
        if host is not None:
            parts.append({key: data for key, data in host.runtime.data._cache.items() if key[0] == "train"})
        seen.append((moment, any(_bears(_pickled(_plain(part))) for part in parts)))

    def serving_begins(self: Unlearning, server: Server, *args: Any) -> None:
        look(server, "before")
        serve(self, server, *args)

    def serving(self: Certification, receipt: Any, server: Server) -> None:
        served(self, receipt, server)
        look(server, "after")

    monkeypatch.setattr(Unlearning, "_process", serving_begins)
    monkeypatch.setattr(Certification, "__call__", serving)
    return seen


def _plain(part: Any) -> Any:
    """Return what pickle can take: stores as their folders' names or their states, samples without their functions."""
    if hasattr(part, "_states"):
        return dict(part._states)
    if hasattr(part, "folder"):
        return [path.read_bytes() for path in sorted(Path(part.folder).rglob("*.safetensors"))]
    if isinstance(part, dict):
        return {str(key): _plain(value) for key, value in part.items()}
    if isinstance(part, (list, tuple)) and not hasattr(part, "_fields"):
        return [_plain(value) for value in part]
    if hasattr(part, "raw"):
        return [part.x, part.raw]
    if isinstance(part, (torch.Tensor, str, int, float, bytes, type(None))):
        return part
    return repr(part)


SCOPES = {
    "client": "{id: a, scope: client, clients: [1], at: {round: 3}}",
    "sample": "{id: a, scope: sample, samples: [SAMPLES], at: {round: 3}}",
}


def _request(scope: str, data: Path) -> str:
    cfg = compose([*SMALL, f"data.root={data}"])
    marked = split_dataset(cfg, load_dataset(cfg)).train[int(MARKED)]
    return f"unlearning.requests=[{SCOPES[scope].replace('SAMPLES', ','.join(map(str, marked)))}]"


@pytest.mark.parametrize(
    ("unlearner", "state", "scope"),
    [
        ("continue_without", "files", "client"),
        ("retrain", "memory", "sample"),
        pytest.param("continue_without", "files", "sample", marks=pytest.mark.slow),
        pytest.param("retrain", "memory", "client", marks=pytest.mark.slow),
    ],
)
def test_nothing_of_the_mark_is_left(
    scope: str, unlearner: str, state: str, data: Path, tmp_path: Path, stores: list[tuple[str, bool]]
) -> None:
    settings = _settings(data, tmp_path / "a", "backend=inline", f"backend.state={state}", f"unlearner={unlearner}")
    settings += [_request(scope, data), "unlearning.reference=true"]
    folder = run(compose(settings), settings, [], quiet=True)
    assert stores == [("before", True), ("after", False)]
    assert _files_with_mark(folder) == []
    trained = load(folder).metrics
    late = trained[(trained["phase"] == "train") & (trained["round"] >= 3) & (trained["name"] == "num_examples")]
    assert MARKED not in set(late[late["value"] > 0]["client"])


def test_a_finished_run_forgets_its_checkpoints_too(data: Path, tmp_path: Path) -> None:
    settings = _settings(data, tmp_path / "a", "backend=inline", "backend.state=files", "unlearner=continue_without")
    settings += ["compare_with='client.epochs=2'", "unlearning.reference=true"]
    folder = run(compose(settings), settings, [], quiet=True)
    marked = _files_with_mark(folder)
    assert {name.split("/")[0] for name in marked} == {"checkpoints", "clients", "reference"}
    assert main(["forget", str(folder), "--client", MARKED, "--id", "a", "--quiet"]) == 0
    assert _files_with_mark(folder) == []


def test_references_of_before_are_deleted(data: Path, tmp_path: Path) -> None:
    """A first request's reference still knows what the second one wants forgotten."""
    settings = _settings(data, tmp_path / "a", "backend=inline", "unlearner=retrain")
    settings += ["unlearning.requests=[{id: other, scope: client, clients: [2], at: {round: 2}}]"]
    folder = run(compose(settings), settings, [], quiet=True)
    assert any(name.startswith("references/") for name in _files_with_mark(folder))
    assert main(["forget", str(folder), "--client", MARKED, "--id", "a", "--quiet"]) == 0
    assert _files_with_mark(folder) == []


@pytest.mark.slow
def test_references_that_are_shared_remain_and_the_certificate_says_so(data: Path, tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    settings = [*_settings(data, tmp_path / "b", "backend=inline", "unlearner=retrain"), f"unlearning.cache={shared}"]
    settings += ["unlearning.requests=[{id: other, scope: client, clients: [2], at: {round: 2}}]"]
    folder = run(compose(settings), settings, [], quiet=True)
    [path] = (folder / "certificates").glob("*.json")
    remains = [row for row in json.loads(path.read_text())["erasure"] if row["outcome"] == "retained"]
    assert [row["part"] for row in remains] == ["references"]
    assert _files_with_mark(shared)


def test_what_is_on_its_way_is_dropped(data: Path, tmp_path: Path, stores: list[tuple[str, bool]]) -> None:
    settings = _settings(data, tmp_path / "a", "backend=inline", "unlearner=continue_without", "async.buffer=1")
    settings += ["devices=tiers", "rounds_per_task=8", _request("client", data), "unlearning.reference=false"]
    folder = run(compose(settings), settings, [], quiet=True)
    assert stores[-1] == ("after", False)
    assert _files_with_mark(folder) == []


def _worker_bears(home: int) -> tuple[int, bool]:
    """Look through this process for stores and samples of workers: (process, whether any bears the mark)."""
    import gc
    import os

    from fedcl.client.local_data import PartitionedData
    from fedcl.simulation.worker import Worker

    if os.getpid() == home:
        return home, False
    parts: list[Any] = []
    for thing in gc.get_objects():
        if isinstance(thing, Worker):
            parts += [thing._store._states, thing._records and [str(record) for record in thing._records]]
        elif isinstance(thing, PartitionedData):
            parts.append({str(key): data for key, data in thing._cache.items() if key[0] == "train"})
    return os.getpid(), any(_bears(_pickled(_plain(part))) for part in parts)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
@pytest.mark.parametrize("scope", list(SCOPES))
def test_no_worker_keeps_a_copy(
    scope: str, data: Path, tmp_path: Path, stores: list[tuple[str, bool]], monkeypatch: pytest.MonkeyPatch
) -> None:
    import os

    found: dict[str, set[tuple[int, bool]]] = {}

    def ask(server: Server, moment: str) -> None:
        futures = [server.compute(_worker_bears, os.getpid()) for _ in range(8)]
        found[moment] = {future.result() for future in futures}

    serve, served = Unlearning._process, Certification.__call__

    def serving_begins(self: Unlearning, server: Server, *args: Any) -> None:
        ask(server, "before")
        serve(self, server, *args)

    def serving(self: Certification, receipt: Any, server: Server) -> None:
        served(self, receipt, server)
        ask(server, "after")

    monkeypatch.setattr(Unlearning, "_process", serving_begins)
    monkeypatch.setattr(Certification, "__call__", serving)
    settings = _settings(data, tmp_path / "a", "backend=ray", "backend.workers=2", "unlearner=continue_without")
    settings += [_request(scope, data), "unlearning.reference=false"]
    folder = run(compose(settings), settings, [], quiet=True)
    assert any(bears for _, bears in found["before"])
    assert len(found["after"]) == 2
    assert not any(bears for _, bears in found["after"])
    assert stores == [("before", True), ("after", False)]
    assert _files_with_mark(folder) == []


Hash = Callable[[Path], str]
TWO = "{id: bob, scope: client, clients: [1], at: {round: 1}}, {id: c2, scope: class, classes: [2], at: {round: 3}}"


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
@pytest.mark.parametrize("unlearner", ["continue_without", "retrain"])
def test_workers_give_the_same_bits(unlearner: str, data: Path, tmp_path: Path, metrics_hash: Hash) -> None:
    """Retraining puts other states under the numbers of visits that workers have seen: no old copy may stand in."""
    folders = []
    for backend in (["backend=inline"], ["backend=ray", "backend.workers=2"]):
        settings = _settings(data, tmp_path / str(len(folders)), *backend, f"unlearner={unlearner}")
        settings += [f"unlearning.requests=[{TWO}]", "unlearning.reference=false"]
        folders.append(run(compose(settings), settings, [], quiet=True))
    assert metrics_hash(folders[0]) == metrics_hash(folders[1])
    contents = [
        [json.loads(path.read_text())["model"] for path in sorted((folder / "certificates").glob("*.json"))]
        for folder in folders
    ]
    assert contents[0] == contents[1]
