from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedcl.scenario.materialise import materialise, targets
from fedcl.scenario.task import Task
from fedcl.scenario.transforms import CORRUPTIONS, apply_transform

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


EVERY: list[dict[str, Any]] = [
    {"name": "permute", "seed": 3},
    {"name": "rotate", "degrees": 37.0},
    {"name": "hue", "degrees": 77.0},
    {"name": "tone", "contrast": 0.7, "brightness": 0.3},
    *({"name": "noise", "severity": severity, "seed": 9} for severity in range(1, 6)),
    *({"name": name, "severity": severity} for name in CORRUPTIONS[1:] for severity in range(1, 6)),
]


def images(samples: int, *shape: int) -> torch.Tensor:
    return torch.randn(samples, *shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("transform", EVERY, ids=str)
def test_a_sample_becomes_the_same_in_any_company(transform: dict[str, Any]) -> None:
    for shape in ((3, 32, 32), (3, 7, 5)):
        x = images(40, *shape)
        whole = apply_transform(x, transform)
        assert whole.shape == x.shape
        assert not torch.equal(whole, x)
        for rows in ([0], [39], [5, 2], list(range(39, -1, -1)), list(range(0, 40, 3)), list(range(33))):
            assert torch.equal(apply_transform(x[rows], transform), whole[rows])
        assert apply_transform(x[:0], transform).shape == (0, *shape)


def test_hue_turns_colours_and_leaves_grey_alone() -> None:
    x = images(2, 3, 4, 4)
    # a third of a turn makes red green, green blue, and blue red
    torch.testing.assert_close(apply_transform(x, {"name": "hue", "degrees": 120.0}), x[:, [2, 0, 1]])
    grey = images(2, 1, 4, 4).expand(2, 3, 4, 4)
    torch.testing.assert_close(apply_transform(grey, {"name": "hue", "degrees": 50.0}), grey)
    turned = apply_transform(x, {"name": "hue", "degrees": 50.0})
    torch.testing.assert_close(turned.norm(dim=1), x.norm(dim=1))
    with pytest.raises(ValueError, match="hue needs samples with three channels"):
        apply_transform(images(1, 1, 4, 4), {"name": "hue", "degrees": 50.0})


def test_tone_and_contrast_by_hand() -> None:
    x = torch.tensor([0.0, 1.0, 2.0, 4.0]).view(1, 1, 2, 2)
    toned = apply_transform(x, {"name": "tone", "contrast": 0.5, "brightness": 1.0})
    assert toned.flatten().tolist() == [1.0, 1.5, 2.0, 3.0]
    drawn = apply_transform(x, {"name": "contrast", "severity": 5})  # a fifth of the distance to 2 is left
    torch.testing.assert_close(drawn.flatten(), torch.tensor([1.6, 1.8, 2.0, 2.4]))


def test_noise_is_noise_within_the_range_of_the_image() -> None:
    # half way between the ends nothing is cut off at severity 1
    x = torch.full((50, 1, 20, 20), 0.5)
    x[:, :, 0, 0], x[:, :, 0, 1] = 0.0, 1.0
    x[:, :, 0, 2] = torch.linspace(0.4, 0.6, 50).view(-1, 1)  # so that no two are the same
    noise = apply_transform(x, {"name": "noise", "severity": 1, "seed": 0}) - x
    inner = noise[:, 0, 1:]
    assert abs(float(inner.mean())) < 0.002
    assert float(inner.std()) == pytest.approx(0.08, rel=0.03)
    between = torch.corrcoef(inner.flatten(1))
    assert float((between - torch.eye(50)).abs().max()) < 0.25  # 380 pixels: independent ones stay below
    other = apply_transform(x, {"name": "noise", "severity": 1, "seed": 1}) - x
    assert abs(float(torch.corrcoef(torch.stack([inner.flatten(), other[:, 0, 1:].flatten()]))[0, 1])) < 0.03
    strong = apply_transform(x, {"name": "noise", "severity": 5, "seed": 0})
    assert float(strong.min()) >= 0.0
    assert float(strong.max()) <= 1.0
    assert torch.equal(strong[0], apply_transform(x[:1].clone(), {"name": "noise", "severity": 5, "seed": 0})[0])


def test_blur_by_hand_and_pixels_grow() -> None:
    x = torch.zeros(1, 1, 5, 5)
    x[0, 0, 2, 2] = 16.0
    blurred = apply_transform(x, {"name": "blur", "severity": 1})
    assert blurred[0, 0, 1:4, 1:4].tolist() == [[1.0, 2.0, 1.0], [2.0, 4.0, 2.0], [1.0, 2.0, 1.0]]
    assert float(blurred.sum()) == 16.0
    ramp = torch.arange(8.0).view(1, 1, 1, 8).expand(1, 1, 8, 8)
    coarse = apply_transform(ramp, {"name": "pixelate", "severity": 5})  # two cells of four
    assert coarse[0, 0, 0].tolist() == [2.0, 2.0, 2.0, 2.0, 6.0, 6.0, 6.0, 6.0]
    kinds = [
        len(set(apply_transform(ramp, {"name": "pixelate", "severity": s})[0, 0, 0].tolist())) for s in range(1, 6)
    ]
    assert kinds == [7, 6, 5, 4, 2]


@pytest.mark.parametrize("name", ["tone", "noise", "blur", "contrast", "pixelate"])
def test_images_are_needed(name: str) -> None:
    transform = next(t for t in EVERY if t["name"] == name)
    with pytest.raises(ValueError, match=f"{name} needs samples of shape"):
        apply_transform(torch.ones(2, 9), transform)


def test_unknown_transforms_are_refused() -> None:
    with pytest.raises(ValueError, match="transform fog: must be one of"):
        apply_transform(torch.ones(1, 4), {"name": "fog"})
