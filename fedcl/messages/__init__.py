"""The wire: nobody else knows the names of records and keys.

Down, a message holds ``arrays`` (one float32 vector ``flat``), ``fedcl`` (who, when, which task) and perhaps
``payload``; a stock strategy adds its own ``config``. Up, a reply holds ``arrays`` under the key that was sent,
``metrics`` with ``num-examples``, and perhaps ``payload``.
A *cohort message* addresses several clients that train from one model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeVar, cast

from flwr.app import ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from torch import Tensor

from fedcl.contracts.fields import BASE, CLIENT_ID, CODE, clean, shown, whole
from fedcl.messages.arrays import FLAT, read_array, record_tensors, tensors_record, vector_record
from fedcl.scenario.task import Task

ARRAYS, VISIT, METRICS, PAYLOAD, CONFIG = "arrays", "fedcl", "metrics", "payload", "config"
NUM_EXAMPLES = "num-examples"
NOTE, BLOCKS = "note", "blocks"
R = TypeVar("R", ArrayRecord, ConfigRecord, MetricRecord)
_OF_REPLY = {ARRAYS: ArrayRecord, METRICS: MetricRecord, PAYLOAD: ArrayRecord, VISIT: ConfigRecord}
Kind = Literal["train", "evaluate", "query", "task_end", "unlearn", "forget", "hello"]
CHANGES_STATE: tuple[Kind, ...] = ("train", "task_end", "forget")  # a client has at most one of these under way
MESSAGE_TYPE = {"train": "train", "evaluate": "evaluate"} | dict.fromkeys(
    ("query", "task_end", "unlearn", "forget", "hello"), "query"
)


@dataclass(frozen=True, slots=True)
class Request:
    """One client's instruction, unpacked.

    Attributes
    ----------
    visit
        The client's message number: how many messages that change its state it was sent before. A state is staged and
        committed by it.
    local_round
        How many train messages the client was sent before (-1: as many as ``visit``). Random draws of training are
        keyed by it, so that they do not depend on any other message in between.
    committed
        The client's last message number that the server accepted (-1: none).
    name
        The name of a query.
    model
        The weights to start from, float32 (P,), to be read only.
    note
        Text that some kinds of message need: what to forget, and the tasks that hold it.
    block
        The block in whose partial sum the reply may be (-1: none, it must come back by itself).
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
    local_round: int = -1
    note: str = ""
    block: int = -1


@dataclass(frozen=True, slots=True)
class SummedReply:
    """What the server knows of tensors that are in a partial sum: L2 norms of change and uploads, and their bytes."""

    norm: float
    num_bytes: int
    payload_norms: dict[str, float] = field(default_factory=dict)


@dataclass(slots=True)
class Reply:
    """A client's reply; ``model`` (P,) float32 for training, ``payload`` for queries and declared uploads.

    ``note`` is text: what became of a client's memory of a forget set. ``summed`` replaces model and payload where they
    are in a partial sum already.
    """

    num_examples: int
    metrics: dict[str, float] = field(default_factory=dict)
    model: Tensor | None = None
    payload: dict[str, Tensor] = field(default_factory=dict)
    note: str = ""
    summed: SummedReply | None = None

    @property
    def num_bytes(self) -> int:
        """Bytes of the arrays that the client sent, or would have sent by itself."""
        if self.summed is not None:
            return self.summed.num_bytes
        return (self.model.nbytes if self.model is not None else 0) + sum(t.nbytes for t in self.payload.values())


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
    """Return the record that says who is addressed, with which message number, in which task."""
    first = requests[0]
    blocks = [r.block for r in requests]
    return ConfigRecord(
        {
            "kind": first.kind,
            "name": first.name,
            "clients": [r.client for r in requests],
            "visits": [r.visit for r in requests],
            "committed": [r.committed for r in requests],
            "local_rounds": [r.local_round for r in requests],
            "round": first.server_round,
            "version": first.version,
            "task": first.task.to_json() if first.task is not None else "",
            NOTE: first.note,
            **({BLOCKS: blocks} if max(blocks) >= 0 else {}),
        }
    )


def requests(content: RecordDict) -> Iterator[Request]:
    """Unpack an instruction, lazily: one request for each client it addresses.

    Raises
    ------
    ValueError
        If the message is not one of fedcl's.
    """
    visit = named(content, VISIT, ConfigRecord)
    if visit is None:
        raise ValueError("the message has no 'fedcl' record: it does not come from a fedcl server")
    arrays = named(content, ARRAYS, ArrayRecord)
    payload = named(content, PAYLOAD, ArrayRecord)
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
        model=read_array(arrays[FLAT]) if arrays is not None else None,
        payload=record_tensors(payload) if payload is not None else {},
        note=cast(str, visit.get(NOTE, "")),
    )
    local_rounds, blocks = (
        cast(list[int], visit["local_rounds"]),
        cast(list[int], visit.get(BLOCKS, [-1] * len(clients))),
    )
    for client, number, last, done, block in zip(clients, visits, committed, local_rounds, blocks, strict=True):
        yield replace(shared, client=client, visit=number, committed=last, local_round=done, block=block)


def named(content: RecordDict, name: str, kind: type[R]) -> R | None:
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
    check_records(content, _OF_REPLY)
    metrics = named(content, METRICS, MetricRecord)
    if metrics is None or NUM_EXAMPLES not in metrics:
        raise ValueError(f"the reply has no '{METRICS}' record with '{NUM_EXAMPLES}'")
    arrays, payload = named(content, ARRAYS, ArrayRecord), named(content, PAYLOAD, ArrayRecord)
    if arrays is not None and list(arrays) != [FLAT]:
        raise ValueError(f"the reply's '{ARRAYS}' holds {shown(list(arrays))}, sent was ['{FLAT}']")
    visit = named(content, VISIT, ConfigRecord)
    if visit is not None and set(visit) != {NOTE}:
        raise ValueError(f"the reply's '{VISIT}' holds {shown(list(visit))}: only '{NOTE}' may come back")
    values: dict[str, Any] = dict(metrics)
    return Reply(
        num_examples=values.pop(NUM_EXAMPLES),
        metrics=values,
        model=_read(ARRAYS, arrays)[FLAT] if arrays is not None else None,
        payload=_read(PAYLOAD, payload) if payload is not None else {},
        note=cast(str, visit[NOTE]) if visit is not None else "",
    )


def _read(name: str, record: ArrayRecord) -> dict[str, Tensor]:
    """Return a record's tensors; whatever bytes a client sent, what cannot be read is a ValueError naming it."""
    tensors = {}
    for key, array in record.items():
        try:
            tensors[key] = read_array(array)
        except Exception as error:  # numpy's reader raises whatever foreign bytes lead it to
            raise ValueError(f"the reply's '{name}' holds an unreadable {shown(key)}: {clean(str(error))}") from error
    return tensors


def content_bytes(content: RecordDict) -> int:
    """Return how many bytes the arrays of a message have, as they came over the wire."""
    return sum(len(array.data) for record in content.array_records.values() for array in record.values())


def hello_content(note: str = "") -> RecordDict:
    """Return the message that asks a node which client it is; ``note`` is what the run expects of it."""
    content = RecordDict()
    content[VISIT] = visit_record([Request("hello", "", 0, -1, -1, 0, None, note=note)])
    return content


def hello_reply(client: str, num_examples: int, code: str, base: str = "") -> RecordDict:
    """Return the reply to :func:`hello_content`: client id, number of samples, version of fedcl, digest of the base."""
    content = RecordDict()
    content[VISIT] = ConfigRecord({"client": client, "code": code, "base": base})
    content[METRICS] = MetricRecord({NUM_EXAMPLES: num_examples})
    return content


def read_hello(content: RecordDict) -> tuple[str, int, str, str]:
    """Return (client, num_examples, code version, base digest) of a hello reply; no digest from a fedcl without one.

    Raises
    ------
    ValueError
        If the reply is not one, or one of its fields is not as declared, naming it.
    """
    check_records(content, {VISIT: ConfigRecord, METRICS: MetricRecord})
    visit, metrics = named(content, VISIT, ConfigRecord), named(content, METRICS, MetricRecord)
    plain = metrics is not None and set(metrics) == {NUM_EXAMPLES}
    if visit is None or metrics is None or not plain or set(visit) - {"base"} != {"client", "code"}:
        raise ValueError("the message is not a reply to fedcl's hello")
    client, code, base = visit["client"], visit["code"], visit.get("base", "")
    if not isinstance(client, str) or not CLIENT_ID.fullmatch(client):
        raise ValueError(
            f"client id {shown(client)}: must be 1 to 128 of A-Z a-z 0-9 . _ -, and start with a letter or digit"
        )
    if not isinstance(code, str) or not CODE.fullmatch(code):
        raise ValueError(f"version {shown(code)}: is not a version of fedcl")
    if not isinstance(base, str) or not BASE.fullmatch(base):
        raise ValueError(f"base {shown(base)}: is not a SHA-256 of fixed tensors")
    return client, whole(metrics[NUM_EXAMPLES], f"'{NUM_EXAMPLES}'"), code, base


def check_records(content: RecordDict, allowed: Mapping[str, type]) -> None:
    """Refuse records that are not in ``allowed``, or have another type.

    Raises
    ------
    ValueError
        Naming the first of them.
    """
    for name, record in content.items():
        if name not in allowed:
            raise ValueError(f"the reply holds the unknown record {shown(name)}")
        if not isinstance(record, allowed[name]):
            raise ValueError(f"the reply's '{name}' is {type(record).__name__}: must be {allowed[name].__name__}")
