from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch

from fedcl.contracts.fields import LARGEST, MAX_EXAMPLES, MAX_METRICS, MODEL, TensorField, clean
from fedcl.contracts.requests import outcomes_from
from fedcl.messages import Reply
from fedcl.models.flat import Spec, TensorSpec
from fedcl.server.validation import Expected, rejection

SPEC = Spec(
    [
        TensorSpec("fc.weight", (2, 2), 0, 4, "parameter", None),
        TensorSpec("fc.bias", (2,), 4, 6, "parameter", None),
        TensorSpec("bn.running_mean", (2,), 6, 8, "buffer", None),
    ]
)
METRICS = {"loss": 0.5, "loss_first": 0.7, "steps": 3.0, "samples_trained": 12.0}
SOUND = Reply(5, METRICS, torch.arange(8, dtype=torch.float32), {"variate": torch.ones(8)})
EXPECTED = Expected.of("train", SPEC, {"variate": MODEL}, num_tasks=3)


def judge(reply: Reply, expected: Expected = EXPECTED) -> str | None:
    found = rejection(reply, expected)
    return None if found is None else found.reason


def poisoned(position: int, value: float) -> torch.Tensor:
    model = torch.zeros(8)
    model[position] = value
    return model


def test_a_sound_reply_passes() -> None:
    assert judge(SOUND) is None


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(
    ("position", "tensor", "within"), [(3, "fc.weight", 3), (4, "fc.bias", 0), (7, "bn.running_mean", 1)]
)
def test_not_finite_names_the_tensor(value: float, position: int, tensor: str, within: int) -> None:
    reason = judge(replace(SOUND, model=poisoned(position, value)))
    assert reason is not None
    assert f"tensor {tensor} holds" in reason
    assert f"position {within}" in reason


def test_infinities_that_cancel_are_seen() -> None:
    model = poisoned(0, float("inf"))
    model[1] = float("-inf")
    assert "fc.weight" in (judge(replace(SOUND, model=model)) or "")


def test_numbers_of_which_squares_and_sums_stay_finite_pass_and_larger_ones_do_not() -> None:
    assert judge(replace(SOUND, model=torch.full((8,), LARGEST))) is None
    reason = judge(replace(SOUND, model=torch.full((8,), -1.001 * LARGEST)))
    assert reason == "tensor fc.weight holds -1.001e+18 at position 0: must be a number in [-1e+18, 1e+18]"


@pytest.mark.parametrize("shape", [(1,), (7,), (9,), (1, 8), (8, 1), (2, 4), ()])
def test_a_wrong_shape_is_refused_even_where_it_would_broadcast(shape: tuple[int, ...]) -> None:
    reason = judge(replace(SOUND, model=torch.zeros(shape)))
    assert reason is not None
    assert str(shape) in reason
    assert "(8,)" in reason


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.int64, torch.complex64])
def test_a_wrong_dtype_is_refused(dtype: torch.dtype) -> None:
    assert str(dtype) in (judge(replace(SOUND, model=torch.zeros(8, dtype=dtype))) or "")


def test_a_missing_model_is_refused() -> None:
    assert judge(replace(SOUND, model=None)) == "no model in the reply"


COUNTS: list[Any] = [-1, MAX_EXAMPLES + 1, 10**400, True, 5.0, 2.5, float("nan"), float("inf"), "5", None, [5]]


@pytest.mark.parametrize("kind", ["train", "evaluate", "query", "unlearn", "task_end", "forget"])
@pytest.mark.parametrize("count", COUNTS, ids=repr)
def test_a_count_that_is_no_whole_number_in_range_is_refused_in_every_kind(kind: Any, count: Any) -> None:
    reason = judge(Reply(count), Expected.of(kind, SPEC))
    assert reason is not None
    assert reason.startswith("num_examples=")
    assert len(reason) < 250


OFF: dict[str, dict[Any, Any]] = {
    "metric loss is nan": {"loss": float("nan")},
    "metric loss is inf": {"loss": float("inf")},
    "metric loss is 1e+39": {"loss": 1e39},
    "metric loss is True": {"loss": True},
    "metric loss is '1'": {"loss": "1"},
    "metric loss is [1, 2]": {"loss": [1, 2]},
    "metric loss is 1j": {"loss": 1j},
    "metric loss is None": {"loss": None},
    "metric steps is -1.0": {"steps": -1.0},
    "metric steps is 1.5: must be a whole number": {"steps": 1.5},
    "metric accuracy_received is 1.1": {"accuracy_received": 1.1},
    "metric 'surprise' is not allowed": {"surprise": 1.0},
    "metric 'accuracy' is not allowed": {"accuracy": 1.0},
    "metric 'accuracy@3@0' is not allowed": {"accuracy@3@0": 1.0},  # there are three tasks
    "metric 'accuracy@01@0' is not allowed": {"accuracy@01@0": 1.0},
    "metric 'accuracy@1@-1' is not allowed": {"accuracy@1@-1": 1.0},
    "metric accuracy@1@0 is 2.0": {"accuracy@1@0": 2.0},
    "metric 7 is not allowed": {7: 1.0},
    r"metric '\ud800' is not allowed": {"\ud800": 1.0},
    "metrics: at most": {str(i): 1.0 for i in range(MAX_METRICS)},
}


@pytest.mark.parametrize(("named", "metrics"), OFF.items(), ids=OFF)
def test_a_metric_that_is_not_as_declared_is_refused(named: str, metrics: dict[Any, Any]) -> None:
    reason = judge(replace(SOUND, metrics=METRICS | metrics))
    assert reason is not None
    assert named in reason
    assert len(reason) < 250


def test_metrics_that_a_client_with_samples_owes_and_those_that_it_may_send() -> None:
    for name in METRICS:
        without = {key: value for key, value in METRICS.items() if key != name}
        assert judge(replace(SOUND, metrics=without)) == f"metric {name} is missing"
    more = {"accuracy_received": 0, "accuracy_trained": 1.0, "state_bytes": 1e6, "accuracy@2@17": 0.5}
    assert judge(replace(SOUND, metrics=METRICS | more)) is None
    evaluated = Expected.of("evaluate", SPEC)
    assert judge(Reply(5), evaluated) == "metric accuracy is missing"
    assert judge(Reply(5, {"accuracy": 0.5}), evaluated) is None
    assert judge(Reply(0), evaluated) is None
    assert "is not allowed" in (judge(replace(SOUND, metrics={**METRICS, "accuracy@1@0": 1.0}), UNPROBED) or "")


UNPROBED = Expected.of("train", SPEC, {"variate": MODEL})
PAYLOADS: list[tuple[dict[Any, Any], str]] = [
    ({}, "payload variate is missing"),
    ({"variate": torch.ones(8), "more": torch.ones(1)}, "'more', which was not asked for"),
    ({"other": torch.ones(8)}, "'other', which was not asked for"),
    ({3: torch.ones(8)}, "3, which was not asked for"),
    ({"variate": torch.ones(1)}, "shape (1,): must be (8,)"),
    ({"variate": torch.ones(8, 1)}, "(8, 1)"),
    ({"variate": torch.ones(())}, "shape (): must be (8,)"),
    ({"variate": torch.ones(0)}, "(0,)"),
    ({"variate": torch.ones(1).expand(10**9)}, "(1000000000,)"),
    ({"variate": poisoned(2, float("nan"))}, "variate holds nan"),
    ({"variate": poisoned(2, float("inf"))}, "variate holds inf"),
    ({"variate": poisoned(2, -3e38)}, "variate holds -3e+38"),
    ({"variate": torch.full((8,), 3e38, dtype=torch.float64)}, "torch.float64: must be torch.float32"),
    ({"variate": torch.ones(8, dtype=torch.complex64)}, "complex64"),
    ({"variate": torch.ones(8, dtype=torch.bool)}, "bool"),
    ({"variate": torch.ones(8, dtype=torch.int64)}, "int64"),
    ({"variate": torch.ones(8).to_sparse()}, "must be a dense tensor"),
    ({"variate": torch.ones(8, device="meta")}, "must be a dense tensor"),
    ({"variate": [1.0] * 8}, "variate is 'list': must be a dense tensor"),
    ({"variate": None}, "must be a dense tensor"),
]


@pytest.mark.parametrize(("payload", "named"), PAYLOADS)
def test_a_payload_at_fault_is_named(payload: dict[Any, Any], named: str) -> None:
    assert named in (judge(replace(SOUND, payload=payload)) or "")


FORM = {
    "sums": TensorField(("columns", "features"), "float64", group="sums"),
    "counts": TensorField(("columns",), "float64", low=0.0, counts=True, group="sums"),
    "choice": TensorField((1,), "int64", low=0, high=4),
    "mask": TensorField(("bitmask",), "uint8"),
}
ANSWER = {
    "sums": torch.zeros(2, 2, dtype=torch.float64),
    "counts": torch.tensor([2.0, 3.0], dtype=torch.float64),
    "choice": torch.tensor([4]),
    "mask": torch.zeros(2, dtype=torch.uint8),
}
HEADED = Spec([TensorSpec("head.weight", (2, 2), 0, 4, "parameter", None), TensorSpec("b", (5,), 4, 9, "buffer", None)])


@pytest.mark.parametrize("kind", ["query", "unlearn"])
def test_an_answer_is_held_to_its_declaration(kind: Any) -> None:
    asked = Expected.of(kind, HEADED, FORM)
    assert {name: field.shape for name, field in asked.tensors.items()} == {
        "sums": (2, 2), "counts": (2,), "choice": (1,), "mask": (2,),
    }  # fmt: skip
    sound = Reply(5, payload=ANSWER)
    assert judge(sound, asked) is None
    assert judge(Reply(0), asked) is None  # who holds nothing owes nothing
    alone = {name: tensor for name, tensor in ANSWER.items() if not FORM[name].group}
    assert judge(replace(sound, payload=alone), asked) is None
    assert judge(replace(sound, payload=alone | {"sums": ANSWER["sums"]}), asked) == "payload counts is missing"
    assert judge(replace(sound, payload={**ANSWER, "choice": torch.tensor([5])}), asked) is not None
    assert judge(replace(sound, payload={**ANSWER, "choice": torch.tensor([-1])}), asked) is not None
    counts = torch.tensor([6.0, -1.0], dtype=torch.float64)
    assert "counts holds -1" in (judge(replace(sound, payload={**ANSWER, "counts": counts}), asked) or "")
    assert "adds up to 5: must be num_examples" in (judge(replace(sound, num_examples=6), asked) or "")
    assert "asks for none" in (judge(replace(sound, model=torch.zeros(9)), asked) or "")
    assert "unexpected note" in (judge(replace(sound, note="[]"), asked) or "")
    assert "metric 'loss' is not allowed" in (judge(replace(sound, metrics={"loss": 1.0}), asked) or "")


NOTES = [
    "no JSON", "[" * 100_000, "null", "3", '{"part": 1}', "[3]", '[{"part": "a", "outcome": "reset"}]', "x" * 70_000,
    '[{"part": "a", "outcome": "gone", "why": "b"}]', '[{"part": 1, "outcome": "reset", "why": "b"}]',
    '[{"part": "a", "outcome": "reset", "why": "b", "more": "c"}]', f"[{','.join(['{}'] * 1000)}]", "9" * 5000, 7, b"",
]  # fmt: skip


@pytest.mark.parametrize("note", NOTES, ids=range(len(NOTES)))
def test_a_note_that_is_no_list_of_residuals_is_refused(note: Any) -> None:
    reason = judge(Reply(3, note=note), Expected.of("forget", SPEC))
    if note != b"":
        assert reason is not None
        assert "note" in reason
        assert len(reason) <= 500


def test_texts_of_a_note_are_cleaned_and_cut() -> None:
    odd = json.dumps([{"part": "\ud800\u202e" * 999, "outcome": "reset", "why": "line\nline\x1b[31m" + "z" * 9999}])
    assert judge(Reply(3, note=odd), Expected.of("forget", SPEC)) is None
    (residual,) = outcomes_from(odd)
    assert len(residual.part) == 120
    assert residual.why.startswith(r"line line\x1b[31mzzz")
    assert residual.why.isprintable()
    assert len(residual.why) == 500


def test_a_client_without_samples_owes_no_payload_but_a_sound_model() -> None:
    assert judge(replace(SOUND, num_examples=0, payload={}, metrics={})) is None
    assert judge(replace(SOUND, num_examples=0, payload={}, model=poisoned(0, float("nan")))) is not None


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("as it is", "as it is"),
        ("two\nlines\tand\x00more", r"two lines and\x00more"),
        ("\ud800\udfff", r"\ud800\udfff"),
        ("\U0001f600 \u00e4", "\U0001f600 \u00e4"),
        ("\u202eback", r"\u202eback"),
        ("x" * 501, "x" * 497 + "..."),
        ("\x00" * 500, (r"\x00" * 125)[:497] + "..."),
    ],
)
def test_a_text_becomes_one_line_that_anything_can_show(text: str, cleaned: str) -> None:
    assert clean(text) == cleaned
    assert clean(text).encode("utf-8")
