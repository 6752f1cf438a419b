"""Every field of a reply, made into what was never declared: for the tests of what comes from a client."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from torch import Tensor

from fedcl.messages import CHANGES_STATE, Reply, requests
from fedcl.simulation.host import ClientHost, Failure

BAD = "1"  # the client at fault throughout
Spoiled = tuple[str, Any]  # the field that is named, and what comes instead
NUMBERS: list[Any] = [True, float("nan"), float("inf"), -1e300, "3", None, [1.0], 1j]
NAMES = ["surprise", "", "\ud800", "x" * 100_000, "accuracy@99@1", "a\nb\x1b[31m"]
NOTES: list[Any] = ["no JSON", "[1]", '[{"part": "a", "outcome": "gone", "why": ""}]', "x" * 70_000, "[" * 10_000]


def spoiled_tensors(tensor: Tensor) -> Iterator[Tensor]:
    """Yield tensors of another shape, type or size of numbers than one that was declared."""
    yield from (tensor[None], torch.zeros(3, 1, 2, dtype=tensor.dtype), torch.zeros(0, dtype=tensor.dtype))
    if tensor.shape:
        yield torch.zeros((), dtype=tensor.dtype)
    if tensor.shape != (1,):
        yield torch.ones(1, dtype=tensor.dtype)  # would broadcast
    yield tensor.to(torch.float64 if tensor.dtype == torch.float32 else torch.float32)
    yield from (tensor.to(torch.complex64), tensor.bool(), tensor.to(torch.int32))
    for value in (float("nan"), float("inf"), -3e38) if tensor.is_floating_point() and tensor.numel() else ():
        changed = tensor.clone()
        changed.view(-1)[-1] = value
        yield changed
    if tensor.dtype == torch.int64:
        yield from (tensor + 10**6, tensor - 10**6)


def spoiled_replies(reply: Reply, kind: str) -> Iterator[Spoiled]:
    """Yield every field of a reply to a message of ``kind``, as a client's own code might garble it."""
    for number in [*NUMBERS, -1, 2.5, 10**12, 10**400]:
        if number is not None or kind != "train":
            yield "num_examples", replace(reply, num_examples=number)
    for name in reply.metrics:
        for number in NUMBERS:
            yield name, replace(reply, metrics=reply.metrics | {name: number})
        if name in ("loss", "loss_first", "steps", "samples_trained", "accuracy"):
            yield name, replace(reply, metrics={key: value for key, value in reply.metrics.items() if key != name})
    for name in NAMES:
        yield "metric", replace(reply, metrics=reply.metrics | {name: 1.0})
    if reply.model is None:
        yield "model", replace(reply, model=torch.zeros(3))
    else:
        yield from (("", replace(reply, model=tensor)) for tensor in [None, *spoiled_tensors(reply.model)])
    for name, tensor in reply.payload.items():
        for changed in spoiled_tensors(tensor):
            yield name, replace(reply, payload=reply.payload | {name: changed})
        yield name, replace(reply, payload={**reply.payload, name: 3.0})
    for name in ("surprise", "\ud800"):
        yield "payload", replace(reply, payload=reply.payload | {name: torch.ones(1)})
    for note in [*NOTES, 7] if kind == "forget" else ["[]"]:
        yield "note", replace(reply, note=note)


def _with(content: RecordDict, **records: Any) -> RecordDict:
    return RecordDict({name: record for name, record in {**content, **records}.items() if record is not None})


def spoiled_contents(content: RecordDict, kind: str) -> Iterator[Spoiled]:
    """Yield every record of a reply's content in another form, as another program than fedcl might send it."""
    metrics = dict(content["metrics"])
    yield "metrics", _with(content, metrics=None)
    yield "metrics", _with(content, metrics=ConfigRecord({"num-examples": 3}))
    yield "num-examples", _with(content, metrics=MetricRecord({"loss": 1.0}))
    for number in (-1, 2.0, [3], 10**12, float("nan")):
        yield "num_examples", _with(content, metrics=MetricRecord({**metrics, "num-examples": number}))
    for name in metrics.keys() - {"num-examples"}:
        yield name, _with(content, metrics=MetricRecord({**metrics, name: [1, 2]}))
    for name in NAMES:
        yield "metric", _with(content, metrics=MetricRecord({**metrics, name: 1.0}))
    yield "secrets", _with(content, secrets=MetricRecord({"a": 1}))
    for note in [None, *NOTES, 7, b"", ["a"]] if kind == "forget" else ["[]"]:
        if note is not None:
            yield "note", _with(content, fedcl=ConfigRecord({"note": note}))
    yield "fedcl", _with(content, fedcl=ConfigRecord({"note": "[]", "block": 0}))
    yield "fedcl", _with(content, fedcl=MetricRecord({"note": 1}))
    for record in ("arrays", "payload"):
        yield record, _with(content, **{record: ConfigRecord({"flat": "x"})})
        yield "", _with(content, **{record: ArrayRecord({"more": Array(np.zeros(3, np.float32))})})
        if record not in content:
            continue
        arrays = dict(content[record])
        yield "", _with(content, **{record: ArrayRecord({**arrays, "more": Array(np.zeros(3, np.float32))})})
        for name, array in arrays.items():
            for other in spoiled_arrays(array):
                named = name if record == "payload" else ""  # of a model it is the tensor that is named
                yield named, _with(content, **{record: ArrayRecord({**arrays, name: other})})


def spoiled_arrays(array: Array) -> Iterator[Array]:
    """Yield arrays whose bytes are not what they say, not numbers, or not to be opened."""
    dtype, shape, data = array.dtype, array.shape, array.data
    vast = data.replace(str(shape).encode(), b"(10**12,)" if len(shape) else b"(9,)", 1)
    for bytes_ in (b"", b"garbage", data[:-1], data + b"\0", vast):
        yield Array(dtype, shape, "numpy.ndarray", bytes_)
    yield Array(dtype, shape, "pickle", data)
    yield Array(np.array(["a", "b"]))
    yield Array(np.zeros(shape, ">f8"))
    yield Array(np.broadcast_to(np.complex64(0), (3, 1)).copy())


@dataclass
class Spoiling(ClientHost):
    """Answers as ever, but BAD's replies are spoiled, one field each; without ``seed`` they are lost instead.

    On the ``wire`` contents are spoiled, where each client has its own messages; else what the runtime returns is.
    """

    seed: int | None = None
    wire: bool = False
    spoiled: list[tuple[str, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)

    def run(self, content: RecordDict) -> Iterator[tuple[str, RecordDict | Failure]]:
        kinds = {request.client: request.kind for request in requests(content)}
        with _replies(self, self._garble if not self.wire else None):
            for client, reply in super().run(content):
                if self.wire and client == BAD and isinstance(reply, RecordDict):
                    yield client, self._choose(kinds[client], spoiled_contents(reply, kinds[client]))
                else:
                    yield client, reply

    def _garble(self, reply: Reply, kind: str) -> Reply | Exception:
        if self.seed is None:
            self.spoiled.append((kind, ""))
            return RuntimeError("no reply")
        return self._choose(kind, spoiled_replies(reply, kind))

    def _choose(self, kind: str, choices: Iterator[Spoiled]) -> Any:
        named, changed = self._random.choice(list(choices))
        self.spoiled.append((kind, named))
        return changed


class _replies:
    """For a while let a host's runtime give BAD's replies to ``change`` before anybody sees them."""

    def __init__(self, host: ClientHost, change: Callable[[Reply, str], Reply | Exception] | None) -> None:
        self._runtime, self._change = host.runtime, change

    def __enter__(self) -> None:
        train, visit, change = self._runtime.train, self._runtime.visit, self._change
        if change is None:
            return

        def training(asked: Any, store: Any) -> Iterator[Reply | Exception]:
            for request, reply in zip(asked, train(asked, store), strict=True):
                yield change(reply, "train") if request.client == BAD and isinstance(reply, Reply) else reply

        def visiting(request: Any, store: Any) -> Reply:
            reply = visit(request, store)
            changed = change(reply, request.kind) if request.client == BAD else reply
            if isinstance(changed, Exception):
                raise changed
            return changed

        self._runtime.train, self._runtime.visit = training, visiting  # type: ignore[method-assign]

    def __exit__(self, *_: Any) -> None:
        self._runtime.__dict__.pop("train", None)
        self._runtime.__dict__.pop("visit", None)


__all__ = ["BAD", "CHANGES_STATE", "Spoiling", "spoiled_contents", "spoiled_replies"]
