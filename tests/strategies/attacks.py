"""Runs with lying clients: the real loop on digits dealt out evenly, and replies that are forged on their way.

A forger knows what every honest client of the round sends (the strongest attacker there is) and what itself would.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import replace
from typing import Any

import torch
from flwr.app import ConfigRecord
from torch import Tensor

from fedcl.assembly import load_dataset
from fedcl.config.compose import compose
from fedcl.data.dataset import Dataset
from fedcl.messages import ARRAYS, BLOCKS, VISIT, read_reply, reply_content
from fedcl.messages.arrays import FLAT, record_tensors
from fedcl.runs.setup import Setup, make_server
from fedcl.simulation.backend import Backend, open_backend
from fedcl.simulation.compat import message_with
from tests.toy import Diary

# K = honest clients, P = parameters
Forge = Callable[[Tensor, Tensor], Tensor]  # honest changes (K, P) and the forger's own (P,) -> what it sends


def sign_flip(honest_KP: Tensor, own_P: Tensor) -> Tensor:
    """Send the own change ten times, backwards."""
    return -10 * own_P


def alie(honest_KP: Tensor, own_P: Tensor) -> Tensor:
    """Stay within what honest changes spread: mean - z std of each coordinate (Baruch et al., NeurIPS 2019), z 1.5."""
    return honest_KP.mean(0) - 1.5 * honest_KP.std(0)


def ipm(honest_KP: Tensor, own_P: Tensor) -> Tensor:
    """Turn the mean's inner product with the truth: -epsilon mean (Xie et al., UAI 2020), epsilon 1.1."""
    return -1.1 * honest_KP.mean(0)


FORGERS: dict[str, Forge] = {"sign_flip": sign_flip, "alie": alie, "ipm": ipm}
ATTACKS = (*FORGERS, "label_flip")
# of ten clients, up to three of whom lie
RULES: dict[str, list[str]] = {
    "fedavg": ["strategy/collaboration=fedavg"],
    "median": ["strategy/collaboration=median"],
    "trimmed_mean": ["strategy/collaboration=trimmed_mean", "strategy.collaboration.server.share=0.3"],
    "krum": ["strategy/collaboration=krum", "strategy.collaboration.server.attackers=3"],
    "multi_krum": [
        "strategy/collaboration=krum",
        "strategy.collaboration.server.attackers=3",
        "strategy.collaboration.server.keep=5",
    ],
    "geometric_median": ["strategy/collaboration=geometric_median"],
}


class Liars:
    """A grid on which the replies of some clients are forged; in everything else it is the grid itself."""

    def __init__(self, backend: Backend, forge: Forge, liars: Collection[str]) -> None:
        self._grid, self._forge = backend.grid, forge
        self._liars = {backend.nodes[client] for client in liars}
        self._base: dict[str, Tensor] = {}  # message id -> the model that went out with it
        self.forged = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._grid, name)

    def push_messages(self, messages: Iterable[Any]) -> list[str]:
        """Pass training messages on and note the models they carry."""
        sent = list(messages)
        for message in sent:  # whose reply is forged must send it by itself
            visit = message.content[VISIT]
            message.content[VISIT] = ConfigRecord({name: visit[name] for name in visit if name != BLOCKS})
        ids = list(self._grid.push_messages(sent))
        for message_id, message in zip(ids, sent, strict=True):
            self._base[message_id] = record_tensors(message.content.array_records[ARRAYS])[FLAT]
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> list[Any]:
        """Pass the round's replies on, the liars' forged."""
        messages = list(self._grid.pull_messages(message_ids))
        changes = [self._change(message) for message in messages]
        honest = [c for c, m in zip(changes, messages, strict=True) if m.metadata.src_node_id not in self._liars]
        return [
            self._forged(message, torch.stack(honest), change)
            if message.metadata.src_node_id in self._liars
            else message
            for message, change in zip(messages, changes, strict=True)
        ]

    def _change(self, message: Any) -> Tensor:
        model = read_reply(message.content).model
        assert model is not None
        return model.double() - self._base[message.metadata.reply_to_message_id].double()

    def _forged(self, message: Any, honest_KP: Tensor, own_P: Tensor) -> Any:
        base = self._base[message.metadata.reply_to_message_id].double()
        model = (base + self._forge(honest_KP, own_P)).float()
        self.forged += 1
        content = reply_content(replace(read_reply(message.content), model=model), live=True)
        return message_with(message.metadata, content)


def flipped(dataset: Dataset, positions: Iterable[int]) -> Dataset:
    """Return ``dataset`` with class y of the train samples at ``positions`` called (classes - 1 - y)."""
    y = dataset.train.y.copy()
    chosen = list(positions)
    y[chosen] = dataset.num_classes - 1 - y[chosen]
    return replace(dataset, train=replace(dataset.train, y=y))


def attacked(rule: str, attack: str | None, liars: int, *, seed: int = 0, rounds: int = 10) -> tuple[float, Diary]:
    """Return the accuracy after ``rounds`` rounds of ten clients, the first ``liars`` of whom attack, and the diary."""
    overrides = ["data=digits", "data/partition=iid", "scenario=joint", "model=mlp", "model.hidden=[32]"]
    overrides += ["strategy/projection=none", "backend=inline", "compare_with=null", "device=cpu", "num_clients=10"]
    overrides += [f"rounds_per_task={rounds}", "evaluation.every=0", f"seed={seed}", *RULES[rule]]
    cfg = compose(overrides)
    setup, bad, diary = Setup.of(cfg, load_dataset(cfg)), [str(i) for i in range(liars)], Diary()
    if attack == "label_flip":
        positions = [int(i) for part in setup.partition.train[:liars] for i in part]
        setup = replace(setup, dataset=flipped(setup.dataset, positions))
    with open_backend(cfg, setup.dataset, setup.partition) as backend:
        grid: Any = backend.grid
        if attack in FORGERS:
            grid = Liars(backend, FORGERS[attack], bad)
        recorder: Any = diary
        make_server(cfg, setup, replace(backend, grid=grid), recorder).run(lambda _: None)
        assert attack not in FORGERS or grid.forged == liars * rounds
    assert diary.faults == []
    return [row["value"] for row in diary.rows if (row["phase"], row["name"]) == ("test", "accuracy")][-1], diary
