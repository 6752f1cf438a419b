"""A toy that any configuration can be run on in a moment, and what it writes down.

Six classes of 16x16 images and four clients. With ``edges``, client 1 lacks the classes 2 and 3 (an empty task where
classes come two by two) and client 2 holds a single sample, of class 0.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedcl.assembly import learner_factories
from fedcl.base.tree import equal, pack, unpack
from fedcl.config.compose import compose
from fedcl.contracts.learner import Payload
from fedcl.data.dataset import Dataset, Partition
from fedcl.messages import PAYLOAD, VISIT
from fedcl.messages.arrays import record_tensors
from fedcl.runs.setup import Setup, make_server
from fedcl.runs.unlearning import make_unlearning
from fedcl.server.loop import Server
from fedcl.simulation.backend import Backend, open_backend
from tests.toy_files import write_sources

Choices = dict[str, str]  # group -> choice
CLASSES, TRAIN, TEST = 6, 16, 6  # train and test samples of each class
PARTS = ("strategy/collaboration", "strategy/staleness", "strategy/optimizer", "strategy/projection")
DEFAULTS: Choices = {
    "backend": "inline", "data": "npz", "data/partition": "iid", "scenario": "class_incremental", "model": "mlp",
    "learner": "finetune", "strategy": "pipeline", "strategy/projection": "none",
}  # fmt: skip
# of the data; 5 where there are ten classes
NUM_TASKS = dict.fromkeys(("npz", "idx", "cifar10", "cifar100", "folder", "hf", "text"), 3) | {"cifar100_subset": 4}
# Settings that make a choice small enough; {npz}, {idx} and {trace} are the toy's own files.
FITS: dict[str, list[str]] = {
    "data=npz": ["data.root={npz}"],
    "data=idx": ["data.root={idx}"],
    "data=mnist": ["data.source.train_limit=200", "data.source.test_limit=50"],
    "data=fashion_mnist": ["data.source.train_limit=200", "data.source.test_limit=50"],
    "data=cifar100_subset": ["data.source.train_limit=800", "data.source.test_limit=50", "client.optimizer.lr=0.02"],
    "data=cifar10": ["data.root={cifar10}", "client.optimizer.lr=0.02"],
    "data=cifar100": ["data.root={cifar100}", "client.optimizer.lr=0.02"],
    "data=folder": ["data.root={folder}"],
    "data=hf": ["data.root={hf}"],
    "data=text": ["data.root={text}", "data.source.window=8", "data.source.test_fraction=0.3"],
    "data=digits": ["data.source.test_fraction=0.9"],
    "client/optimizer=rmsprop": ["client.optimizer.lr=0.003"],
    **{f"client/optimizer={name}": ["client.optimizer.lr=0.01"] for name in ("adam", "adamw", "torch")},
    "model=module": [
        "trusted_packages=[tests]",
        "model.module._target_=tests.toy_network.Cnn",
        "model.classifier=fc",
    ],
    "data/partition=k_classes": ["data.partition.k=5"],  # fewer, and a client lacks all classes of some task
    "data/partition=dirichlet_client": ["data.partition.train_size=20", "data.partition.test_size=4"],
    "data/augment=cifar": ["data.augment.padding=1", "client.epochs=6"],
    "data/augment=crop_flip": ["data.augment.padding=1", "client.epochs=6"],
    "data/augment=cutout": ["data.augment.cutout=2"],
    "model=mlp": ["model.hidden=[8]"],
    "model=fot_mlp": ["model.hidden=[16,16,16]", "model.dropout=[0.1,0.1,0.1]", "client.epochs=8"],
    "model=lenet": ["client.epochs=8"],
    "model=vit": ["model.dim=8", "model.depth=1", "model.attention_heads=2", "client.epochs=6"],
    "model=char_transformer": ["model.dim=8", "model.depth=1", "model.attention_heads=2"],
    "model=resnet8": ["model.width=4"],
    "model=resnet10": ["model.width=4"],
    "model=resnet18": ["model.width=4", "model.groups=2"],
    "devices=trace": ["devices.path={trace}"],
    "scenario=domain_corrupted": ["scenario.corruption=noise"],
    "scenario/schedule=growing": ["scenario.schedule.start=0.5"],
    "scenario/schedule=shifted": ["scenario.schedule.max_lag=1"],
    # its first and last round belong to other clients than each other's, with other tasks between them
    "scenario/schedule=shuffled": ["client.epochs=6"],
    # a head alone is nothing that a loss shows
    "learner=nmc": ["learner.nmc.train=all"],
    "learner=ranpac": ["learner.ranpac.train=all"],
    "learner=protocl": ["learner.protocl.train=all"],
    "learner=er": ["learner.er.budget=8"],
    # their loss has no replay in it at the first step
    "learner=derpp": ["client.epochs=4"],
    "learner=er_ace": ["client.epochs=6", "learner.er_ace.replay_size=2"],
    "learner=uer": ["client.epochs=6"],
    "learner=view_batch": ["client.epochs=8", "learner.view_batch.repeats=2", "learner.view_batch.shift=0"],
    "strategy=flower_fedadam": ["strategy.stock.eta=0.01"],
    "strategy/projection=fot_official": ["strategy.projection.server.epsilon_increment=0.01"],
    "strategy/projection=fot": [
        "strategy.projection.server.epsilon=0.8",
        "strategy.projection.server.epsilon_increment=0.01",
    ],
}
# Choices that go along with one, unless chosen otherwise.
ALONG: dict[str, Choices] = {
    "strategy/collaboration=fedbn": {"model": "resnet8"},
    "model=char_transformer": {"data": "text"},
    "unlearner=acu": {"learner": "ranpac"},
}
# Files that come with no installation: below the folder that FEDCL_DATA names.
NEEDS = {"data=mnist": "mnist", "data=fashion_mnist": "fashion_mnist", "data=cifar100_subset": "cifar100_subset.npz"}
# ... and libraries that are no part of an installation for tests.
LIBRARIES = {"data=hf": "datasets", "data/partition=flwr": "flwr_datasets"}
ELSEWHERE = {
    "backend=ray": "tests/simulation starts Ray",
    "backend=flower": "tests/simulation starts Flower",
    "data/partition=local": "tests/simulation/test_fleet.py has devices with data of their own",
}
FAULTS = {"client_failed", "reply_rejected", "round_skipped"}


def label(choices: Mapping[str, str]) -> str:
    """Return ``group=choice`` of each."""
    return " ".join(f"{group}={choice}" for group, choice in choices.items())


def missing(choice: str) -> str | None:
    """Say why ``group=choice`` cannot run here, or return None."""
    if choice in ELSEWHERE:
        return ELSEWHERE[choice]
    if choice in LIBRARIES and importlib.util.find_spec(LIBRARIES[choice]) is None:
        return f"{choice} needs the package {LIBRARIES[choice]}"
    root = os.environ.get("FEDCL_DATA", "")
    if choice in NEEDS and not (Path(root) / NEEDS[choice]).exists():
        return f"{choice} needs {NEEDS[choice]} in the folder that FEDCL_DATA={root or '(unset)'} names"
    return None


def write_files(folder: Path) -> dict[str, str]:
    """Write images (each class a pattern of its own under noise) as npz and as idx files, and a list of devices."""
    rng = np.random.default_rng(0)
    patterns = rng.random((CLASSES, 16, 16))
    halves = {}
    for half, prefix, each in (("train", "train", TRAIN), ("test", "t10k", TEST)):
        y = np.tile(np.arange(CLASSES, dtype=np.uint8), each)
        x = (255 * np.clip(0.7 * patterns[y] + 0.3 * rng.random((len(y), 16, 16)), 0, 1)).astype(np.uint8)
        halves |= {f"x_{half}": x, f"y_{half}": y}
        for name, array in ((f"{prefix}-images-idx3-ubyte", x), (f"{prefix}-labels-idx1-ubyte", y)):
            head = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">i4").tobytes()
            (folder / name).write_bytes(head + array.tobytes())
    speakers = {f"speaker_{half}": np.arange(len(halves[f"y_{half}"])) % 5 for half in ("train", "test")}
    np.savez(folder / "toy.npz", **halves, **speakers)
    (folder / "devices.csv").write_text("client,speed\n0,1.0\n1,0.5\n2,2.0\n3,1.0\n")
    others = write_sources(folder, halves)
    return {"npz": str(folder / "toy.npz"), "idx": str(folder), "trace": str(folder / "devices.csv"), **others}


def configure(
    choices: Choices, files: Mapping[str, str], device: torch.device, *extra: str, num_tasks: int | None = None
) -> dict[str, Any]:
    """Compose the toy's configuration with some groups chosen otherwise."""
    return compose([*overrides_of(choices, files, device, num_tasks=num_tasks), *extra])


def overrides_of(
    choices: Choices, files: Mapping[str, str], device: torch.device, *, num_tasks: int | None = None
) -> list[str]:
    """Return the overrides of the toy's configuration with some groups chosen otherwise."""
    stock = choices.get("strategy", "pipeline") != "pipeline"
    for group, choice in list(choices.items()):
        choices = ALONG.get(f"{group}={choice}", {}) | choices
    chosen = {group: choice for group, choice in (DEFAULTS | choices).items() if not (stock and group in PARTS)}
    overrides = [f"device={device.type}", "compare_with=null", "num_clients=4"]
    overrides += ["rounds_per_task=2", "client.epochs=2", "client.batch_size=5", "client.optimizer.lr=0.1"]
    if chosen["scenario"] != "joint":
        overrides.append(f"scenario.num_tasks={num_tasks or NUM_TASKS.get(chosen['data'], 5)}")
    for group, choice in chosen.items():
        overrides += [f"{group}={choice}", *(text.format(**files) for text in FITS.get(f"{group}={choice}", []))]
    return overrides


def awkward(dataset: Dataset) -> Partition:
    """Deal the toy's samples out: a third each to clients 0, 1 and 3, but for what 1 lacks and the one that 2 gets."""
    y = dataset.train.y
    third = np.arange(len(y)) // CLASSES % 3
    single = np.flatnonzero((y == 0) & (third == 1))[:1]
    without = np.setdiff1d(np.flatnonzero((third == 1) & ~np.isin(y, (2, 3))), single)
    train = (np.flatnonzero(third == 0), without, single, np.flatnonzero(third == 2))
    return Partition(train, (np.arange(len(dataset.test.y)),) * 4)


@dataclass
class Diary:
    """A run written down in memory; ``traffic`` holds payloads by (direction, name), or by the query's name.

    ``hashes`` are of the global model after each round, ``saved`` snapshots before the first and after each, and
    ``payloads`` what strategy and learner declare; ``rounds`` is how many the schedule has.
    """

    rows: list[dict[str, Any]] = field(default_factory=list)
    events: list[dict[str, Any]] = field(default_factory=list)
    hashes: list[str] = field(default_factory=list)
    saved: list[dict[str, Any]] = field(default_factory=list)
    traffic: dict[tuple[str, str], list[Tensor]] = field(default_factory=lambda: defaultdict(list))
    payloads: list[Payload] = field(default_factory=list)
    rounds: int = 0

    def row(self, **row: Any) -> None:
        """Record one value."""
        self.rows.append(row)

    def event(self, kind: str, **fields: Any) -> None:
        """Record that something happened."""
        self.events.append({"kind": kind, **fields})

    def timing(self, round: int, name: str, seconds: float) -> None:
        """Times are of no interest here."""

    @property
    def faults(self) -> list[dict[str, Any]]:
        """What went wrong, as the server saw it."""
        return [event for event in self.events if event["kind"] in FAULTS]


class Watched:
    """A grid that notes the payloads going by; in everything else it is the grid itself."""

    def __init__(self, backend: Backend, diary: Diary) -> None:
        self._grid, self._diary = backend.grid, diary
        self._query: dict[str, str] = {}  # message id -> the question it puts

    def __getattr__(self, name: str) -> Any:
        return getattr(self._grid, name)

    def push_messages(self, messages: Iterable[Any]) -> list[str]:
        """Pass messages on."""
        sent = list(messages)
        ids = list(self._grid.push_messages(sent))
        for message_id, message in zip(ids, sent, strict=True):
            self._query[message_id] = str(message.content.config_records[VISIT]["name"])
            self._note("down", self._query[message_id], message)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> list[Any]:
        """Pass replies on."""
        replies = list(self._grid.pull_messages(message_ids))
        for reply in replies:
            self._note("up", self._query[reply.metadata.reply_to_message_id], reply)
        return replies

    def send_and_receive(self, messages: Iterable[Any], *, timeout: float | None = None) -> list[Any]:
        """Pass messages on, and all their replies back."""
        sent = list(messages)
        query = str(sent[0].content.config_records[VISIT]["name"]) if sent else ""
        replies = list(self._grid.send_and_receive(sent, timeout=timeout))
        for way, direction in ((sent, "down"), (replies, "up")):
            for message in way:
                self._note(direction, query, message)
        return replies

    def _note(self, direction: str, query: str, message: Any) -> None:
        record = None if message.has_error() else message.content.array_records.get(PAYLOAD)
        for name, tensor in record_tensors(record).items() if record is not None else ():
            self._diary.traffic[direction, query or name].append(tensor.clone())


class Enough(Exception):
    """The run has been played as far as is needed."""


def run_toy(
    cfg: dict[str, Any],
    *,
    edges: bool = False,
    until: int = -1,
    start: dict[str, Any] | None = None,
    watch: bool = True,
    cohorts: bool = True,
) -> Diary:
    """Play a run, going on from a snapshot if ``start`` is one, and stop after round ``until``.

    Without ``watch`` nobody looks at payloads before the server does: some are not meant to be read. Without
    ``cohorts`` each client has its own messages, as devices do.
    """
    setup = Setup.of(cfg)
    diary = Diary(rounds=setup.schedule.num_rounds)
    setup = replace(setup, partition=awkward(setup.dataset)) if edges else setup
    with open_backend(cfg, setup.dataset, setup.partition) as backend, TemporaryDirectory() as folder:
        watched: Any = Watched(backend, diary) if watch else backend.grid
        recorder: Any = diary
        states = backend.states
        assert states is not None
        unlearning = make_unlearning(cfg, setup, backend, Path(folder)) if cfg["unlearning"]["requests"] else None
        server = make_server(
            cfg, setup, replace(backend, grid=watched, cohorts=cohorts), recorder, unlearning=unlearning
        )
        plugins = [build() for build in learner_factories(cfg).values()]
        declared = (payload for owner in (server.strategy, *plugins) for payload in owner.payloads)
        diary.payloads = list(dict.fromkeys(declared))
        if start is not None:
            server.load_state_dict(start["server"])
            for client, (visit, state) in start["clients"].items():
                states.stage(client, visit, state)
            assert equal(server.state_dict(), start["server"])
        diary.saved.append(snapshot(server, {}))

        def after_round(server_round: int) -> None:
            diary.hashes.append(hashlib.sha256(server.global_model.numpy().tobytes()).hexdigest())
            committed = {c: v for c, v in server.exchange.committed.items() if states.has(c, v)}
            diary.saved.append(snapshot(server, {c: (v, states.load(c, v)) for c, v in committed.items()}))
            if server_round == until:
                raise Enough

        try:
            server.run(after_round)
        except Enough:
            return diary
    return diary


def snapshot(server: Server, clients: dict[str, tuple[int, Any]]) -> dict[str, Any]:
    """Return everything that survives a run, as it comes back from disk."""
    tree = {"server": server.state_dict(), "clients": clients}
    packed, tensors = pack(tree)
    read: dict[str, Any] = unpack(json.loads(json.dumps(packed)), {name: t.clone() for name, t in tensors.items()})
    assert equal(read, tree)
    return read
