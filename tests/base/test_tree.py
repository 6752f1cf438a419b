from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from fedcl.base.tree import clone, equal, pack, unpack


def test_a_tree_survives_being_packed_written_and_unpacked() -> None:
    tree = {
        "a/b": torch.arange(3),
        "a": {"b": torch.ones(2, 2), "c": [torch.zeros(1), 1.5, None, True, "text"]},
        "%2F": torch.full((1,), 7.0),
        "/": torch.full((1,), 8.0),
        "empty": {},
    }
    values, tensors = pack(tree)
    assert equal(unpack(json.loads(json.dumps(values)), tensors), tree)
    assert len(tensors) == 5


def test_floats_survive_json_to_the_last_bit() -> None:
    tree = {"x": [0.1 + 0.2, 1e-300, -0.0, 2**53 + 1]}
    values, tensors = pack(tree)
    assert unpack(json.loads(json.dumps(values)), tensors) == tree


@pytest.mark.parametrize("leaf", [np.zeros(2), object(), {1: 2}, {"__tensor__": "a"}, b"bytes"])
def test_what_cannot_be_stored_is_refused_by_its_place(leaf: object) -> None:
    with pytest.raises(TypeError, match="state at part/here"):
        pack({"part": {"here": leaf}})


def test_a_clone_shares_nothing() -> None:
    tree = {"a": [torch.zeros(2)]}
    copy = clone(tree)
    copy["a"][0] += 1
    assert tree["a"][0].tolist() == [0.0, 0.0]
    assert not equal(tree, copy)
