"""A grid whose nodes are the real client app with real devices' folders, called in this process."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Context, Error, Message, Metadata, RecordDict
from flwr.serverapp import Grid

from fedcl import client_app
from fedcl.data.dataset import Dataset, Partition
from fedcl.simulation.compat import CLIENT_RAISED, NODE_UNAVAILABLE, message_with

RUN_ID = 77


class DirectGrid(Grid):
    """Flower's grid as devices see it: single nodes, errors as replies, a context that each message loses."""

    def __init__(self, specs: dict[int, Path], run_config: dict[str, Any]) -> None:
        self.specs, self.run_config = dict(specs), run_config
        self.away: set[int] = set()
        self.seen: list[tuple[int, str]] = []
        self._replies: dict[str, Message] = {}

    def set_run(self, run: Any) -> None: ...

    @property
    def run(self) -> Any:
        return RUN_ID

    def create_message(self, *args: Any, **kwargs: Any) -> Message:
        raise NotImplementedError

    def get_node_ids(self) -> list[int]:
        return [node for node in self.specs if node not in self.away]

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        ids = []
        for message in messages:
            message_id = f"m{len(self.seen)}"
            message.metadata.__dict__["_message_id"] = message_id
            node = message.metadata.dst_node_id
            self.seen.append((node, str(message.content.config_records["fedcl"]["kind"])))
            self._replies[message_id] = reply_to(message, self._answer(node, message))
            ids.append(message_id)
        return ids

    def _answer(self, node: int, message: Message) -> RecordDict | Error:
        if node in self.away or node not in self.specs:
            return Error(NODE_UNAVAILABLE, "no heartbeat")
        context = Context(RUN_ID, node, {"spec": str(self.specs[node])}, RecordDict(), self.run_config)
        try:
            return client_app.answer(message, context).content
        except Exception as error:
            return Error(CLIENT_RAISED, str(error))

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        return [self._replies.pop(id_) for id_ in message_ids if id_ in self._replies]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        return self.pull_messages(self.push_messages(messages))


def reply_to(message: Message, outcome: RecordDict | Error) -> Message:
    sent = message.metadata
    metadata = Metadata(
        run_id=RUN_ID,
        message_id=f"{sent.message_id}-reply",
        src_node_id=sent.dst_node_id,
        dst_node_id=sent.src_node_id,
        reply_to_message_id=sent.message_id,
        group_id="",
        created_at=time.time(),
        ttl=sent.ttl,
        message_type=sent.message_type,
    )
    return message_with(metadata, outcome)


def write_device(folder: Path, client: str, dataset: Dataset, train: Sequence[int], test: Sequence[int]) -> Path:
    """Write a device's own file, with its own classes only, in an order of its own, and return its spec."""
    folder.mkdir(parents=True)
    (x, y), (x_test, y_test) = _half(dataset.train, train), _half(dataset.test, test)
    held = sorted({*y.tolist(), *y_test.tolist()}, reverse=True)
    own = {label: place for place, label in enumerate(held)}
    np.savez(
        folder / "samples.npz",
        x_train=x * np.float32(dataset.scale),
        y_train=np.array([own[label] for label in y.tolist()], np.int64),
        x_test=x_test * np.float32(dataset.scale),
        y_test=np.array([own[label] for label in y_test.tolist()], np.int64),
        classes=np.array([dataset.classes[label] for label in held]),
    )
    spec = folder / "client.yaml"
    spec.write_text(f'client: "{client}"\ndata: [data=npz, "data.root={folder / "samples.npz"}"]\n')
    return spec


def _half(half: Any, held: Sequence[int]) -> tuple[Any, Any]:
    positions = np.asarray(held, np.int64)
    return half.x[positions][:, 0], half.y[positions]


def write_devices(folder: Path, dataset: Dataset, partition: Partition) -> dict[str, Path]:
    """Write one device for each part, and return their specs by client."""
    parts = zip(partition.train, partition.test, strict=True)
    return {
        str(i): write_device(folder / str(i), str(i), dataset, train.tolist(), test.tolist())
        for i, (train, test) in enumerate(parts)
    }
