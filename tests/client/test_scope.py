from __future__ import annotations

import pytest
import torch

from fedcl.client.scope import check_scope, in_scope
from fedcl.models.flat import FlatModel
from fedcl.models.networks import MLP


def network(device: torch.device, hidden: tuple[int, ...] = (3,)) -> FlatModel:
    return FlatModel(MLP(input_shape=(2,), heads=(1, 2), hidden=hidden), device=device)


# hidden.0: weight 6, bias 3; heads.0: weight 3, bias 1; heads.1: weight 6, bias 2
@pytest.mark.parametrize(
    ("scope", "expected"),
    [
        (r"^(?!head)", [1.0] * 9 + [0.0] * 12),
        (r"bias$", [0.0] * 6 + [1.0] * 3 + [0.0] * 3 + [1.0] + [0.0] * 6 + [1.0] * 2),
        (r"heads\.1", [0.0] * 13 + [1.0] * 8),
        ("", [1.0] * 21),
    ],
)
def test_what_an_expression_takes(device: torch.device, scope: str, expected: list[float]) -> None:
    held = in_scope(network(device), scope, "learner.x.scope")
    assert held is not None
    assert held.tolist() == expected


def test_null_is_everything_and_costs_nothing(device: torch.device) -> None:
    assert in_scope(network(device), None, "learner.x.scope") is None
    check_scope(None, "learner.x.scope")


def test_a_scope_that_matches_nothing_names_key_and_tensors(device: torch.device) -> None:
    with pytest.raises(ValueError, match=r"^learner\.x\.scope='attn': matches no tensor .* hidden\.0\.weight, hid"):
        in_scope(network(device), "attn", "learner.x.scope")
    with pytest.raises(ValueError, match=r"hidden\.3\.bias, and 4 more$"):
        in_scope(network(device, (3, 3, 3, 3)), "attn", "learner.x.scope")


def test_what_is_no_expression_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^learner\.x\.scope='\(': must be a regular expression or null"):
        check_scope("(", "learner.x.scope")
