"""The wire: the only module that knows the names of records and keys.

Down, a message holds ``arrays`` (one float32 vector ``flat``), ``fedcl`` (who, when, which task) and perhaps
``payload``; a stock strategy adds its own ``config``. Up, a reply holds ``arrays`` under the key that was sent,
``metrics`` with ``num-examples``, and perhaps ``payload``.
A *cohort message* addresses several clients that train from one model.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeVar, cast

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from numpy.typing import NDArray
from torch import Tensor

from fedcl.scenario.task import Task

ARRAYS, FLAT, VISIT, METRICS, PAYLOAD, CONFIG = "arrays", "flat", "fedcl", "metrics", "payload", "config"
NUM_EXAMPLES = "num-examples"
NOTE = "note"
CLIENT_ID = re.compile(r"[A-Za-z0-9._-]+")
R = TypeVar("R", ArrayRecord, ConfigRecord, MetricRecord)
Kind = Literal["train", "evaluate", "query", "task_end", "unlearn", "forget", "hello"]
CHANGES_STATE: tuple[Kind, ...] = ("train", "task_end", "forget")  # a client has at most one of these under way
MESSAGE_TYPE = {"train": "train", "evaluate": "evaluate"} | dict.fromkeys(
    ("query", "task_end", "unlearn", "forget", "hello"), "query"
)


class LiveArray(Array):
    """A Flower array that holds a numpy array and turns it into bytes only when somebody reads ``data``.

    Inside one machine arrays then travel by reference or zero-copy; on a network they serialise as any other does.
    """

    def __init__(self, ndarray: NDArray[Any]) -> None:
        self.__dict__.update(
            dtype=str(ndarray.dtype), shape=tuple(ndarray.shape), stype="numpy.ndarray", _live=ndarray, _is_dirty=True
        )

    @property
    def data(self) -> bytes:
        """Bytes of the array in numpy's own format, without pickle."""
        if "_bytes" not in self.__dict__:
            self.__dict__["_bytes"] = Array.from_numpy_ndarray(self.__dict__["_live"]).data
        return cast(bytes, self.__dict__["_bytes"])

    @data.setter
    def data(self, value: bytes) -> None:
        self.__dict__["_bytes"] = value

    def numpy(self) -> NDArray[Any]:
        """Return a copy, as the base class does: what others do to it stays with them."""
        return cast(NDArray[Any], self.__dict__["_live"].copy())

    def view(self) -> NDArray[Any]:
        """Return the array itself, which may be shared memory: read, never write."""
        return cast(NDArray[Any], self.__dict__["_live"])

    def __reduce__(self) -> tuple[Any, ...]:
        return (_live_array, (self.view(),))


# Flower writes the class's name into a header when it ships an array; the other side knows only "Array". By that name
# pickle would not find the class, and cloudpickle would ship its code: both are given a function instead.
LiveArray.__qualname__ = "Array"


def _live_array(ndarray: NDArray[Any]) -> LiveArray:
    return LiveArray(ndarray)


@dataclass(frozen=True, slots=True)
class Request:
    """One client's instruction, unpacked.

    ``committed`` is the client's last visit that the server accepted (-1: none); ``model`` the weights to start from,
    float32 (P,), to be read only; ``name`` the question of a query. ``turn`` counts the client's trainings (-1: as
    ``visit``): random draws are keyed by it, so that they do not depend on what else a client was told in between.
    ``note`` is text that a kind of message needs besides: what to forget, and the tasks it lies in.
    """

    kind: Kind
    client: str
    visit: int
    committed: int
    server_round: int
    version: int
    task: Task | None
    name: str = ""
    model: Tensor | None = None
    payload: dict[str, Tensor] = field(default_factory=dict)
    turn: int = -1
    note: str = ""


@dataclass(slots=True)
class Reply:
    """What a client answers; ``model`` (P,) float32 for training, ``payload`` for queries and declared uploads.

    ``note`` is text: what became of a client's memory of a forget set.
    """

    num_examples: int
    metrics: dict[str, float] = field(default_factory=dict)
    model: Tensor | None = None
    payload: dict[str, Tensor] = field(default_factory=dict)
    note: str = ""


def vector_record(vector: Tensor, *, live: bool) -> ArrayRecord:
    """Wrap a flat vector as the ``arrays`` record; ``live`` avoids serialising it."""
    return tensors_record({FLAT: vector}, live=live)


def tensors_record(tensors: Mapping[str, Tensor], *, live: bool) -> ArrayRecord:
    """Wrap named tensors as an array record."""
    record = ArrayRecord()
    for name, tensor in tensors.items():
        ndarray = tensor.detach().cpu().contiguous().numpy()
        record[name] = LiveArray(ndarray) if live else Array(ndarray)
    return record


def record_tensors(record: ArrayRecord) -> dict[str, Tensor]:
    """Return the tensors of a record. They may share read-only memory with it: copy before writing."""
    return {name: _tensor(array) for name, array in record.items()}


def _tensor(array: Array) -> Tensor:
    ndarray = array.view() if isinstance(array, LiveArray) else array.numpy()
    return torch.from_numpy(ndarray if ndarray.flags.writeable else np.asarray(_Unlocked(ndarray)))


class _Unlocked:
    """Shows a read-only array as writable: torch has no read-only tensors, and warns at each one it is given."""

    def __init__(self, ndarray: NDArray[Any]) -> None:
        self.base = ndarray  # keeps the memory alive
        self.__array_interface__ = {**ndarray.__array_interface__, "data": (ndarray.ctypes.data, False)}


def instruction(requests: Sequence[Request], arrays: ArrayRecord | None, payload: ArrayRecord | None) -> RecordDict:
    """Return the content of a message to one client, or to a cohort that shares round, task, model and payload."""
    first = requests[0]
    content = RecordDict()
    if arrays is not None:
        content[ARRAYS] = arrays
    if payload is not None:
        content[PAYLOAD] = payload
    content[VISIT] = visit_record(requests)
    if first.kind == "train":
        content[CONFIG] = ConfigRecord({"server-round": first.server_round})
    return content


def visit_record(requests: Sequence[Request]) -> ConfigRecord:
    """Return the record that says who is addressed, at which visit, in which task."""
    first = requests[0]
    return ConfigRecord(
        {
            "kind": first.kind,
            "name": first.name,
            "clients": [r.client for r in requests],
            "visits": [r.visit for r in requests],
            "committed": [r.committed for r in requests],
            "turns": [r.turn for r in requests],
            "round": first.server_round,
            "version": first.version,
            "task": first.task.to_json() if first.task is not None else "",
            NOTE: first.note,
        }
    )


def requests(content: RecordDict) -> Iterator[Request]:
    """Unpack an instruction, lazily: one request for each client it addresses.

    Raises
    ------
    ValueError
        If the message is not one of fedcl's.
    """
    visit = _named(content, VISIT, ConfigRecord)
    if visit is None:
        raise ValueError("the message has no 'fedcl' record: it does not come from a fedcl server")
    arrays = _named(content, ARRAYS, ArrayRecord)
    payload = _named(content, PAYLOAD, ArrayRecord)
    clients, visits = cast(list[str], visit["clients"]), cast(list[int], visit["visits"])
    committed, task = cast(list[int], visit["committed"]), cast(str, visit["task"])
    shared = Request(
        kind=cast(Kind, visit["kind"]),
        client="",
        visit=0,
        committed=0,
        server_round=cast(int, visit["round"]),
        version=cast(int, visit["version"]),
        task=Task.from_json(task) if task else None,
        name=cast(str, visit["name"]),
        model=_tensor(arrays[FLAT]) if arrays is not None else None,
        payload=record_tensors(payload) if payload is not None else {},
        note=cast(str, visit.get(NOTE, "")),
    )
    turns = cast(list[int], visit["turns"])
    for client, number, last, turn in zip(clients, visits, committed, turns, strict=True):
        yield replace(shared, client=client, visit=number, committed=last, turn=turn)


def _named(content: RecordDict, name: str, kind: type[R]) -> R | None:
    """Return the record ``name`` if it is of ``kind``: Flower's views by kind copy the whole dict at each look."""
    record = content.get(name)
    return record if isinstance(record, kind) else None


def reply_content(reply: Reply, *, live: bool) -> RecordDict:
    """Return the content of a reply message."""
    content = RecordDict()
    if reply.model is not None:
        content[ARRAYS] = vector_record(reply.model, live=live)
    metrics: dict[str, int | float | list[int] | list[float]] = {NUM_EXAMPLES: reply.num_examples}
    metrics.update(reply.metrics)
    content[METRICS] = MetricRecord(metrics)
    if reply.payload:
        content[PAYLOAD] = tensors_record(reply.payload, live=live)
    if reply.note:
        content[VISIT] = ConfigRecord({NOTE: reply.note})
    return content


def read_reply(content: RecordDict) -> Reply:
    """Unpack a reply as far as its form allows; :mod:`fedcl.server.validation` judges the values.

    Raises
    ------
    ValueError
        If a record is missing, has keys that were not asked for, or cannot be read, naming them.
    """
    metrics = _named(content, METRICS, MetricRecord)
    if metrics is None or NUM_EXAMPLES not in metrics:
        raise ValueError(f"the reply has no '{METRICS}' record with '{NUM_EXAMPLES}'")
    arrays = _named(content, ARRAYS, ArrayRecord)
    if arrays is not None and list(arrays) != [FLAT]:
        raise ValueError(f"the reply's '{ARRAYS}' holds {sorted(arrays)}, sent was ['{FLAT}']")
    unknown = set(content) - {ARRAYS, METRICS, PAYLOAD, VISIT}
    if unknown:
        raise ValueError(f"the reply holds the unknown records {sorted(unknown)}")
    payload, visit = _named(content, PAYLOAD, ArrayRecord), _named(content, VISIT, ConfigRecord)
    num_examples = metrics[NUM_EXAMPLES]
    if isinstance(num_examples, list) or not float(num_examples).is_integer():
        raise ValueError(f"'{NUM_EXAMPLES}' is {num_examples}: must be a whole number")
    return Reply(
        num_examples=int(num_examples),
        metrics={k: float(v) for k, v in metrics.items() if k != NUM_EXAMPLES and not isinstance(v, list)},
        model=_read(ARRAYS, arrays)[FLAT] if arrays is not None else None,
        payload=_read(PAYLOAD, payload) if payload is not None else {},
        note=str(visit.get(NOTE, "")) if visit is not None else "",
    )


def _read(name: str, record: ArrayRecord) -> dict[str, Tensor]:
    """Return a record's tensors; whatever bytes a client sent, what cannot be read is a ValueError naming it."""
    tensors = {}
    for key, array in record.items():
        try:
            tensors[key] = _tensor(array)
        except Exception as error:  # numpy's reader raises whatever foreign bytes lead it to
            raise ValueError(f"the reply's '{name}' holds an unreadable '{key}': {error}") from error
    return tensors


def content_bytes(content: RecordDict) -> int:
    """Return how many bytes the arrays of a message have, as they came over the wire."""
    return sum(len(array.data) for record in content.array_records.values() for array in record.values())


def hello_content(note: str = "") -> RecordDict:
    """Return the question that asks a node which client it is; ``note`` is what the run expects of it."""
    content = RecordDict()
    content[VISIT] = visit_record([Request("hello", "", 0, -1, -1, 0, None, note=note)])
    return content


def hello_reply(client: str, num_examples: int, code: str) -> RecordDict:
    """Return the answer to :func:`hello_content`: client id, samples held, version of fedcl."""
    content = RecordDict()
    content[VISIT] = ConfigRecord({"client": client, "code": code})
    content[METRICS] = MetricRecord({NUM_EXAMPLES: num_examples})
    return content


def read_hello(content: RecordDict) -> tuple[str, int, str]:
    """Return (client, num_examples, code version) of a hello reply.

    Raises
    ------
    ValueError
        If the reply is not one, or its client id has other characters than letters, digits, ``.``, ``_`` and ``-``.
    """
    visit, metrics = _named(content, VISIT, ConfigRecord), _named(content, METRICS, MetricRecord)
    if visit is None or metrics is None:
        raise ValueError("the reply is not an answer to fedcl's hello")
    client = str(visit["client"])
    if not CLIENT_ID.fullmatch(client):
        raise ValueError(f"client id {client!r}: may hold letters, digits, '.', '_' and '-' only")
    return client, int(cast(int, metrics[NUM_EXAMPLES])), str(visit["code"])
