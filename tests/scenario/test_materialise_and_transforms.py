from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedcl.scenario.materialise import materialise, targets
from fedcl.scenario.task import Task
from fedcl.scenario.transforms import apply_transform

TASK = Task(1, (7, 2), (3, 4))
Y = np.array([2, 0, 7, 7, 5, 2], np.int64)


def test_materialise_and_targets_by_hand() -> None:
    chosen = materialise(TASK, Y)
    assert chosen.dtype == np.int64
    assert chosen.tolist() == [0, 2, 3, 5]
    columns = targets(TASK, Y[chosen])
    assert columns.dtype == np.int64
    assert columns.tolist() == [4, 3, 3, 4]


def test_a_client_without_the_classes_has_an_empty_task() -> None:
    chosen = materialise(TASK, np.array([0, 1], np.int64))
    assert chosen.tolist() == []
    assert targets(TASK, Y[chosen]).tolist() == []


@pytest.mark.parametrize("label", [0, 8])
def test_targets_refuse_foreign_labels(label: int) -> None:
    with pytest.raises(ValueError, match=f"label {label} is not a class of task 1"):
        targets(TASK, np.array([7, label], np.int64))


def test_no_transform_and_zero_degrees_are_the_identity() -> None:
    x = torch.randn(3, 2, 5, 4, generator=torch.Generator().manual_seed(0))
    assert apply_transform(x, None) is x
    assert torch.equal(apply_transform(x, {"name": "rotate", "degrees": 0.0}), x)


@given(st.integers(0, 2**32 - 1))
def test_permute_moves_positions_alike_in_all_samples_and_channels(seed: int) -> None:
    positions = torch.arange(12.0).view(1, 1, 3, 4).expand(2, 2, 3, 4)
    moved = apply_transform(positions, {"name": "permute", "seed": seed})
    assert moved.shape == (2, 2, 3, 4)
    assert sorted(moved[0, 0].flatten().tolist()) == list(range(12))
    assert torch.equal(moved, moved[:1, :1].expand(2, 2, 3, 4))
    # Another batch, such as the test half, is moved in the same way, and so are flat features.
    other = torch.randn(5, 12, generator=torch.Generator().manual_seed(1))
    order = moved[0, 0].flatten().long()
    assert torch.equal(apply_transform(other, {"name": "permute", "seed": seed}), other[:, order])


def test_permutations_of_different_seeds_differ() -> None:
    x = torch.arange(784.0)[None]
    moved = [tuple(apply_transform(x, {"name": "permute", "seed": s})[0].tolist()) for s in range(4)]
    assert len(set(moved)) == 4


@pytest.mark.parametrize(("degrees", "turns"), [(90.0, 1), (180.0, 2), (270.0, 3)])
def test_quarter_turns_are_exact_and_counter_clockwise(degrees: float, turns: int) -> None:
    x = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    turned = apply_transform(x, {"name": "rotate", "degrees": degrees})
    torch.testing.assert_close(turned, torch.rot90(x, turns, (2, 3)), atol=1e-5, rtol=0)


def test_half_turn_of_an_oblong_image_flips_it() -> None:
    x = torch.randn(1, 1, 4, 7, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(
        apply_transform(x, {"name": "rotate", "degrees": 180.0}), x.flip(2, 3), atol=1e-5, rtol=0
    )


def test_quarter_turn_of_an_oblong_image_keeps_its_proportions() -> None:
    # A vertical bar of three pixels about the centre lies flat afterwards, still three pixels long.
    x = torch.zeros(1, 1, 5, 9)
    x[0, 0, 1:4, 4] = 1.0
    expected = torch.zeros(1, 1, 5, 9)
    expected[0, 0, 2, 3:6] = 1.0
    torch.testing.assert_close(apply_transform(x, {"name": "rotate", "degrees": 90.0}), expected, atol=1e-5, rtol=0)


def test_rotation_fills_with_zero_and_needs_images() -> None:
    turned = apply_transform(torch.ones(1, 1, 9, 9), {"name": "rotate", "degrees": 45.0})
    assert turned[0, 0, 0, 0] == 0.0
    assert turned[0, 0, 4, 4].item() == pytest.approx(1.0)
    with pytest.raises(ValueError, match="rotate needs samples of shape"):
        apply_transform(torch.ones(2, 9), {"name": "rotate", "degrees": 45.0})
    assert apply_transform(torch.ones(0, 1, 9, 9), {"name": "rotate", "degrees": 45.0}).shape == (0, 1, 9, 9)


def test_unknown_transforms_are_refused() -> None:
    with pytest.raises(ValueError, match="transform blur"):
        apply_transform(torch.ones(1, 4), {"name": "blur"})
