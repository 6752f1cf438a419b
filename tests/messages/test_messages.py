from __future__ import annotations

import pickle
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from fedcl.messages import (
    ARRAYS,
    CONFIG,
    METRICS,
    PAYLOAD,
    VISIT,
    Reply,
    Request,
    hello_content,
    hello_reply,
    instruction,
    read_hello,
    read_reply,
    reply_content,
    requests,
)
from fedcl.messages.arrays import FLAT, LiveArray, record_tensors, tensors_record, vector_record
from fedcl.scenario.task import Task

TASK = Task(2, (4, 5), (4, 5), (0, 1, 4, 5), 0, {"name": "rotate", "degrees": 30.0})
MODEL = torch.tensor([1.5, -0.0, 3e38, 1e-40])


def request(client: str, visit: int = 3, committed: int = 2, kind: str = "train") -> Request:
    return Request(kind, client, visit, committed, 9, 7, TASK, "", MODEL)  # type: ignore[arg-type]


def over_the_wire(content: RecordDict) -> RecordDict:
    """Send it as Flower does: into bytes and back."""
    from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
    from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents

    objects = {id_: found.deflate() for id_, found in get_all_nested_objects(content).items()}
    inflated = inflate_object_from_contents(content.object_id, objects)
    assert isinstance(inflated, RecordDict)
    return inflated


@pytest.mark.parametrize("live", [True, False])
@pytest.mark.parametrize("wire", [True, False])
def test_an_instruction_comes_back_as_it_was(live: bool, wire: bool) -> None:
    payload = {"control": torch.arange(6, dtype=torch.float64).view(2, 3), "epoch": torch.tensor([4])}
    content = instruction([request("a-1")], vector_record(MODEL, live=live), tensors_record(payload, live=live))
    (back,) = requests(over_the_wire(content) if wire else content)
    assert (back.kind, back.client, back.visit, back.committed) == ("train", "a-1", 3, 2)
    assert (back.server_round, back.version, back.task, back.name) == (9, 7, TASK, "")
    assert back.model is not None
    assert back.model.numpy().tobytes() == MODEL.numpy().tobytes()
    assert back.payload.keys() == payload.keys()
    for name, tensor in payload.items():
        assert back.payload[name].dtype == tensor.dtype
        assert torch.equal(back.payload[name], tensor)


def test_an_instruction_without_task_model_and_payload() -> None:
    content = instruction([Request("evaluate", "x", 0, -1, 0, 0, None)], None, None)
    assert set(content) == {VISIT}
    (back,) = requests(content)
    assert back.task is None
    assert back.model is None
    assert back.payload == {}


def test_only_training_carries_flowers_round() -> None:
    assert instruction([request("a")], None, None)[CONFIG] == ConfigRecord({"server-round": 9})
    assert CONFIG not in instruction([request("a", kind="query")], None, None)


def test_a_cohort_is_split_into_its_clients() -> None:
    members = [request("0", 3, 2), request("1", 5, 2), request("10", 0, -1)]
    content = instruction(members, vector_record(MODEL, live=True), None)
    split = requests(content)
    assert isinstance(split, Iterator)
    back = list(split)
    assert [(r.client, r.visit, r.committed) for r in back] == [("0", 3, 2), ("1", 5, 2), ("10", 0, -1)]
    assert back[0].model is back[1].model is back[2].model  # one set of weights for all
    assert all(r.task == TASK for r in back)


def test_a_foreign_message_is_refused() -> None:
    with pytest.raises(ValueError, match="no 'fedcl' record"):
        list(requests(RecordDict({"arrays": vector_record(MODEL, live=True)})))


@pytest.mark.parametrize("wire", [True, False])
def test_a_reply_comes_back_as_it_was(wire: bool) -> None:
    content = reply_content(Reply(17, {"loss": 0.25}, MODEL, {"sum": torch.ones(2)}), live=True)
    back = read_reply(over_the_wire(content) if wire else content)
    assert (back.num_examples, back.metrics) == (17, {"loss": 0.25})
    assert back.model is not None
    assert back.model.numpy().tobytes() == MODEL.numpy().tobytes()
    assert torch.equal(back.payload["sum"], torch.ones(2))


def test_a_reply_without_model() -> None:
    back = read_reply(reply_content(Reply(0), live=True))
    assert back.model is None
    assert back.payload == {}


def reply(**records: ArrayRecord | MetricRecord | ConfigRecord) -> RecordDict:
    content = RecordDict({ARRAYS: vector_record(MODEL, live=False), METRICS: MetricRecord({"num-examples": 1})})
    content.update(records)
    return content


def lying(shape: str, dtype: str = "<f4", data: bytes = b"\0" * 16) -> Array:
    """Return four numbers under a header that says something else of them."""
    header = f"{{'descr': {dtype!r}, 'fortran_order': False, 'shape': {shape}, }}".encode()
    header += b" " * (-(10 + len(header) + 1) % 64) + b"\n"
    return Array(
        "float32", (4,), "numpy.ndarray", b"\x93NUMPY\x01\0" + len(header).to_bytes(2, "little") + header + data
    )


LYING = [
    (lying("(1000000000000,)"), "16 bytes"),
    (lying("(1000000, 1000000, 1000000, 1000000)"), "16 bytes"),
    (lying("(3,)"), "16 bytes"),
    (lying("(-4,)"), "no plain array"),
    (lying("(4,)", "|O"), "no plain array"),
    (lying("(4,)", ">f4"), ""),
    (lying("(4,)", "<U1"), ""),
    (lying("(" + "9" * 5000 + ",)"), ""),
    (Array("float32", (4,), "jax", b""), "serialised as 'jax'"),
    (Array("float32", (4,), "numpy.ndarray", b"\x93NUMPY\x03\0\0\0"), "numpy format"),
]


@pytest.mark.parametrize(
    ("content", "names"),
    [
        (RecordDict(), "no 'metrics' record"),
        (reply(metrics=MetricRecord({"loss": 1.0})), "'num-examples'"),
        (reply(arrays=ArrayRecord()), r"holds \[\]"),
        (reply(arrays=tensors_record({"flat": MODEL, "more": MODEL}, live=True)), "more"),
        (reply(more=ConfigRecord()), "unknown record 'more'"),
        (reply(arrays=MetricRecord()), "'arrays' is MetricRecord: must be ArrayRecord"),
        (reply(payload=ConfigRecord()), "'payload' is ConfigRecord"),
        (reply(metrics=ConfigRecord()), "'metrics' is ConfigRecord"),
        (reply(fedcl=ArrayRecord()), "'fedcl' is ArrayRecord"),
        (reply(fedcl=ConfigRecord({"note": "", "block": 0})), "only 'note' may come back"),
        (reply(payload=ArrayRecord({"sum": Array(np.array(["text"]))})), "'payload' holds an unreadable 'sum'"),
        (reply(arrays=ArrayRecord({"flat": Array("float32", (4,), "numpy.ndarray", b"{")})), "unreadable 'flat'"),
        *((reply(arrays=ArrayRecord({"flat": array})), f"unreadable 'flat': .*{why}") for array, why in LYING),
    ],
)
def test_a_malformed_reply_is_a_value_error_that_names_what_is_wrong(content: RecordDict, names: str) -> None:
    with pytest.raises(ValueError, match=names):
        read_reply(content)


def test_a_live_array_has_the_bytes_of_any_other() -> None:
    for ndarray in (MODEL.numpy(), np.arange(6).reshape(2, 3), np.zeros((0, 4), np.uint8), np.array(3.0)):
        live, plain = LiveArray(ndarray), Array(ndarray)
        assert live.data == plain.data
        assert (live.dtype, live.shape, live.stype) == (plain.dtype, plain.shape, plain.stype)
        assert live.object_id == plain.object_id


def test_a_live_array_travels_through_flower_as_an_array() -> None:
    back = over_the_wire(reply_content(Reply(1, {}, MODEL), live=True))[ARRAYS][FLAT]
    assert type(back) is Array
    assert back.numpy().tobytes() == MODEL.numpy().tobytes()


def test_a_live_array_is_pickled_without_turning_it_into_bytes_first() -> None:
    live = LiveArray(MODEL.numpy())
    buffers: list[pickle.PickleBuffer] = []
    data = pickle.dumps(live, protocol=5, buffer_callback=buffers.append)
    assert len(buffers) == 1  # the weights travel out of band: zero-copy between processes
    assert "_bytes" not in vars(live)
    back = pickle.loads(data, buffers=[bytes(buffers[0].raw())])
    assert isinstance(back, LiveArray)
    assert back.data == Array(MODEL.numpy()).data
    assert pickle.loads(pickle.dumps(live)).data == live.data


def test_numpy_is_a_copy_and_view_is_not() -> None:
    ndarray = np.zeros(3, np.float32)
    live = LiveArray(ndarray)
    live.numpy()[0] = 5
    assert ndarray[0] == 0
    assert live.view() is ndarray


def test_a_read_only_array_becomes_a_tensor_that_shares_its_memory() -> None:
    ndarray = np.arange(4, dtype=np.float32)
    ndarray.flags.writeable = False  # as shared memory of another process is
    record = ArrayRecord()
    record[FLAT] = LiveArray(ndarray)
    tensor = record_tensors(record)[FLAT]
    assert tensor.data_ptr() == ndarray.ctypes.data
    del record
    assert tensor.tolist() == [0, 1, 2, 3]


def test_the_hello_round_trip() -> None:
    (asked,) = requests(hello_content())
    assert asked.kind == "hello"
    assert read_hello(over_the_wire(hello_reply("device-3", 120, "1.0"))) == ("device-3", 120, "1.0", "")
    base = "0f" * 32
    assert read_hello(over_the_wire(hello_reply("device-3", 120, "1.0", base))) == ("device-3", 120, "1.0", base)


def hello(client: Any = "3", code: Any = "1.0", samples: Any = 1, base: Any = "", **more: Any) -> RecordDict:
    visit, metrics = (
        ConfigRecord({"client": client, "code": code, "base": base}),
        MetricRecord({"num-examples": samples}),
    )
    return RecordDict({VISIT: visit, METRICS: metrics, **more})


MALFORMED_HELLOS = {
    "empty": RecordDict(),
    "no metrics": RecordDict({VISIT: ConfigRecord({"client": "3", "code": "1.0"})}),
    "no code": RecordDict({VISIT: ConfigRecord({"client": "3"}), METRICS: MetricRecord({"num-examples": 1})}),
    "records of other types": RecordDict({VISIT: MetricRecord({"client": 3}), METRICS: ConfigRecord({"a": "b"})}),
    "another record": hello(more=ConfigRecord()),
    "arrays": hello(arrays=vector_record(MODEL, live=False)),
    **{f"id {client!r}": hello(client) for client in ("", "../../x", ".", "-a", "a b", "a/b", "*", "ä", "x" * 129)},
    **{f"id {client!r}": hello(client) for client in (3, True, b"3", ["3"], "a\n", "\ud800", 0.5)},
    **{f"code {code!r}": hello(code=code) for code in (1, "", "x" * 65, "1.0\n", ["1.0"])},
    **{f"base {base!r}": hello(base=base) for base in (1, "0g" * 32, "0f" * 31, "0f" * 32 + "\n")},
    **{f"samples {number!r}": hello(samples=number) for number in (-1, 1.0, float("nan"), 10**12, [1])},
}


@pytest.mark.parametrize("content", MALFORMED_HELLOS.values(), ids=MALFORMED_HELLOS)
def test_a_malformed_hello_is_a_value_error_of_one_line(content: RecordDict) -> None:
    with pytest.raises(ValueError, match=r"\A.{1,250}\Z") as caught:
        read_hello(content)
    assert str(caught.value).isprintable()


def test_payload_travels_as_a_record_of_its_own() -> None:
    content = instruction([request("0")], vector_record(MODEL, live=True), tensors_record({"c": MODEL}, live=True))
    assert set(content) == {ARRAYS, PAYLOAD, VISIT, CONFIG}
    assert list(content[ARRAYS]) == [FLAT]
