from __future__ import annotations

import pytest
import torch

from fedcl.models.flat import FlatModel
from fedcl.models.merge import layer_factors, scaled_change
from fedcl.models.networks import MLP


def test_factors_rise_from_the_first_layer_to_the_heads() -> None:
    spec = FlatModel(MLP(input_shape=(2,), heads=(1, 1), hidden=(2, 1))).spec
    # hidden.0: 4 + 2, hidden.1: 2 + 1, heads: (1 + 1) each
    assert layer_factors(spec, 0.2).tolist() == pytest.approx([0.2] * 6 + [0.6] * 3 + [1.0] * 4)
    assert layer_factors(FlatModel(MLP(input_shape=(2,), heads=(1,), hidden=())).spec, 0.2).tolist() == [1.0] * 3


def test_a_change_is_scaled_element_by_element() -> None:
    base, model = torch.tensor([1.0, 1.0, 0.0]), torch.tensor([3.0, -1.0, 4.0])
    assert scaled_change(base, model, torch.tensor([0.5, 0.0, 1.0])).tolist() == [2.0, 1.0, 4.0]
