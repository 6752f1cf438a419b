"""Samples as people have them: layouts, types and ranges, what they become, what is said, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedcl.data.dataset import Dataset
from fedcl.data.sources import npz

PIXELS = np.arange(2 * 4 * 5 * 3).reshape(2, 4, 5, 3) * 2  # 0..238


def load(tmp_path: Path, x: Any, x_test: Any = None, **more: Any) -> Dataset:
    path = tmp_path / "own.npz"
    test = x if x_test is None else x_test
    labels = np.arange(len(x)) % 2
    np.savez(path, x_train=x, y_train=labels, x_test=test, y_test=np.arange(len(test)) % 2)
    return npz(root=str(path), **more)


@pytest.mark.parametrize("kind", ["int64", "int32", "uint16", ">i4", "float32", "float64", "float16"])
def test_pixels_of_any_type_are_bytes_and_it_is_said(tmp_path: Path, kind: str) -> None:
    dataset = load(tmp_path, PIXELS.astype(kind))
    assert dataset.train.x.dtype == np.uint8
    assert dataset.scale == 1 / 255
    assert np.array_equal(dataset.train.x, PIXELS.transpose(0, 3, 1, 2))
    assert len(dataset.notes) == 1
    assert "values 0..238 stored as" in dataset.notes[0]
    assert "scaled by 1/255; data.source.scale=1" in dataset.notes[0]
    plain = load(tmp_path, PIXELS.astype(kind), scale=1.0)
    assert (plain.scale, plain.notes) == (1.0, ())
    assert plain.normalise(plain.train.x).max() == 238.0


def test_pixels_between_whole_numbers_stay_between_them(tmp_path: Path) -> None:
    dataset = load(tmp_path, PIXELS + 0.25)
    assert (dataset.train.x.dtype, dataset.scale) == (np.float32, 1 / 255)
    np.testing.assert_allclose(dataset.normalise(dataset.train.x).max(), 238.25 / 255, rtol=1e-6)


@pytest.mark.parametrize(
    ("x", "said"),
    [
        (np.linspace(0, 1, 12).reshape(3, 4), 0),
        (np.linspace(-4, 4, 12).reshape(3, 4), 0),
        (np.arange(12).reshape(3, 4), 0),  # as digits' 0..16
        (np.array([[0, 1], [1, 0]]), 0),
        (np.array([[True, False], [False, True]]), 0),
        (np.array([[18, 50_000], [99, 1_000]]), 1),
        (np.array([[-3.0, 200.0], [5.0, 7.0]]), 1),
        (np.array([[0.5, 200.0], [5.0, 7.0]]), 1),  # a table, no image
    ],
)
def test_other_values_are_taken_as_they_are_and_large_ones_said(tmp_path: Path, x: Any, said: int) -> None:
    dataset = load(tmp_path, x)
    assert (dataset.train.x.dtype, dataset.scale) == (np.float32, 1.0)
    assert np.array_equal(dataset.train.x, x.astype(np.float32))
    assert [("taken as they are" in note) for note in dataset.notes] == [True] * said


def test_bytes_that_are_bits_are_mentioned(tmp_path: Path) -> None:
    assert "data.source.scale=1 leaves them" in load(tmp_path, np.ones((2, 3), np.uint8)).notes[0]


@pytest.mark.parametrize(
    ("shape", "becomes", "said"),
    [
        ((2, 3, 32, 32), (3, 32, 32), True),
        ((2, 1, 28, 28), (1, 28, 28), True),
        ((2, 32, 32, 3), (3, 32, 32), False),
        ((2, 28, 28, 1), (1, 28, 28), False),
        ((2, 28, 28), (1, 28, 28), False),
        ((2, 8, 8, 4), (4, 8, 8), False),
        ((2, 4, 8, 8), (4, 8, 8), True),
        ((2, 12, 9, 10), None, None),
        ((2, 3, 3, 1), (1, 3, 3), False),  # square, or three channels of 3x1
        ((2, 3, 3, 3), None, None),
        ((2, 8, 8, 8), None, None),
        ((2, 1, 28, 1), None, None),
    ],
)
def test_the_channels_are_found_or_asked_for(
    tmp_path: Path, shape: tuple[int, ...], becomes: tuple[int, ...] | None, said: bool
) -> None:
    x = np.zeros(shape)
    x.reshape(-1)[::7] = 0.5
    if becomes is None:
        message = (
            r"may have their channels first or last; set data\.source\.channels=first or data\.source\.channels=last"
        )
        if shape != (2, 12, 9, 10):
            with pytest.raises(ValueError, match=message):
                load(tmp_path, x)
        assert np.array_equal(load(tmp_path, x, channels="first").train.x, x)
        assert np.array_equal(load(tmp_path, x, channels="last").train.x, np.moveaxis(x, 3, 1))
        return
    dataset = load(tmp_path, x)
    assert dataset.input_shape == becomes
    assert any("channels first" in note for note in dataset.notes) is said
    expected = x[:, None] if x.ndim == 3 else x if said else np.moveaxis(x, 3, 1)
    assert np.array_equal(dataset.train.x, expected)


@pytest.mark.parametrize(
    ("x", "x_test", "message"),
    [
        (np.array([[0.0, 1.0], [np.nan, 0.0]]), None, "x_train: sample 1 has nan or inf"),
        (np.zeros((2, 2)), np.array([[0.0, np.inf]]), "x_test: sample 0 has nan or inf"),
        (np.full((2, 2), 1e300), None, r"values 1e\+300\.\.1e\+300 stored as float64: must be within"),
        (np.zeros(3), None, r"samples have shape \(3,\)"),
        (np.zeros((2, 1, 2, 3, 4)), None, r"samples have shape \(2, 1, 2, 3, 4\)"),
        (np.zeros((2, 0)), None, r"samples have shape \(2, 0\)"),
        (np.zeros((2, 2), complex), None, "complex128"),
        (np.array([["a", "b"]]), None, "<U1"),
        (np.zeros((2, 3)), np.zeros((2, 4)), "differ in shape or type"),
        (np.zeros((2, 3), np.uint8), np.zeros((2, 3)), "differ in shape or type"),
    ],
)
def test_samples_that_no_model_can_take(tmp_path: Path, x: Any, x_test: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        load(tmp_path, x, x_test)
    assert "\n" not in str(caught.value)


def test_a_mean_in_pixels_does_not_fit_samples_that_are_scaled(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data\.source\.mean=\[127\.5\]: must be in \[0, 1\]"):
        load(tmp_path, PIXELS, mean=[127.5], std=[127.5])
    assert load(tmp_path, PIXELS, mean=[127.5], std=[127.5], scale=1.0).mean == (127.5,)


def test_arrays_can_go_by_other_names(tmp_path: Path) -> None:
    """As medical image sets in common use have them: their own names, and labels (N, 1)."""
    path = tmp_path / "med.npz"
    images = PIXELS.astype(np.uint8)
    np.savez(path, train_images=images, train_labels=[[0], [1]], test_images=images, test_labels=[[1], [0]])
    keys = {"x_train": "train_images", "y_train": "train_labels", "x_test": "test_images", "y_test": "test_labels"}
    dataset = npz(root=str(path), keys=keys)
    assert dataset.train.y.tolist() == [0, 1]
    assert dataset.input_shape == (3, 4, 5)
    with pytest.raises(ValueError, match=r"data\.source\.keys=.*must give names of arrays for some of x_train"):
        npz(root=str(path), keys={"images": "train_images"})


def test_an_archive_without_a_test_half_is_split_class_by_class(tmp_path: Path) -> None:
    path = tmp_path / "one.npz"
    y = np.repeat([3, 5, 8], [10, 5, 2])
    np.savez(path, x_train=np.arange(17.0)[:, None], y_train=y, writer_train=np.arange(17))
    with pytest.raises(
        ValueError, match=r"lacks x_test, y_test; .* or draw a test half with data\.source\.test_fraction"
    ):
        npz(root=str(path))
    dataset = npz(root=str(path), test_fraction=0.2)
    assert np.bincount(dataset.test.y).tolist() == [2, 1, 1]
    assert sorted([*dataset.train.x[:, 0], *dataset.test.x[:, 0]]) == list(range(17))
    assert dataset.test.meta["writer"].tolist() == dataset.test.x[:, 0].tolist()
    assert np.array_equal(npz(root=str(path), test_fraction=0.2).test.x, dataset.test.x)
    assert not np.array_equal(npz(root=str(path), test_fraction=0.2, seed=1).test.x, dataset.test.x)
