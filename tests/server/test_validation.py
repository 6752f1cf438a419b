from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fedcl.messages import Reply
from fedcl.models.flat import Spec, TensorSpec
from fedcl.server.validation import MAX_EXAMPLES, rejection

SPEC = Spec(
    [
        TensorSpec("fc.weight", (2, 2), 0, 4, "parameter", None),
        TensorSpec("fc.bias", (2,), 4, 6, "parameter", None),
        TensorSpec("bn.running_mean", (2,), 6, 8, "buffer", None),
    ]
)
SOUND = Reply(5, {"loss": 0.5}, torch.arange(8, dtype=torch.float32), {"variate": torch.ones(8)})


def judge(reply: Reply) -> str | None:
    return rejection(reply, SPEC, {"variate": (8,)}, model=True)


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


def test_the_largest_finite_numbers_pass() -> None:
    assert judge(replace(SOUND, model=torch.full((8,), torch.finfo(torch.float32).max))) is None


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


@pytest.mark.parametrize("num_examples", [-1, MAX_EXAMPLES + 1])
def test_a_weight_out_of_range_is_refused(num_examples: int) -> None:
    assert f"num_examples={num_examples}" in (judge(replace(SOUND, num_examples=num_examples)) or "")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_metric_that_is_not_finite_is_refused(value: float) -> None:
    assert "metric loss" in (judge(replace(SOUND, metrics={"loss": value})) or "")


@pytest.mark.parametrize(
    ("payload", "named"),
    [
        ({}, "variate"),
        ({"variate": torch.ones(8), "more": torch.ones(1)}, "more"),
        ({"other": torch.ones(8)}, "other"),
        ({"variate": torch.ones(1)}, "(1,)"),
        ({"variate": torch.ones(8, 1)}, "(8, 1)"),
        ({"variate": poisoned(2, float("nan"))}, "variate is not finite"),
        ({"variate": torch.ones(8, dtype=torch.complex64)}, "complex64"),
    ],
)
def test_a_payload_at_fault_is_named(payload: dict[str, torch.Tensor], named: str) -> None:
    assert named in (judge(replace(SOUND, payload=payload)) or "")


def test_a_client_without_samples_owes_no_payload_but_a_sound_model() -> None:
    assert judge(replace(SOUND, num_examples=0, payload={})) is None
    assert judge(replace(SOUND, num_examples=0, payload={}, model=poisoned(0, float("nan")))) is not None
