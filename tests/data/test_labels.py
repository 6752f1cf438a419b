"""Labels as people have them: what they become, what is said, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedcl.data.sources import npz

ONE_HOT = np.eye(3)[[0, 2, 1, 2]]


def load(tmp_path: Path, y_train: Any, y_test: Any = None, **more: Any) -> Any:
    y = np.asarray(y_train)
    names = {} if "classes" not in more else {"classes": np.array(more.pop("classes"))}
    path = tmp_path / "own.npz"
    other = y if y_test is None else np.asarray(y_test)
    np.savez(path, x_train=np.zeros((len(y), 2)), y_train=y, x_test=np.zeros((len(other), 2)), y_test=other, **names)
    return npz(root=str(path), **more)


@pytest.mark.parametrize(
    ("labels", "codes", "classes"),
    [
        ([10, 11, 19, 10], [0, 1, 2, 0], ("10", "11", "19")),
        ([0, 7, 14, 7], [0, 1, 2, 1], ("0", "7", "14")),
        ([0.0, 2.0, 1.0, 2.0], [0, 2, 1, 2], ("0", "1", "2")),
        (np.array([0, 2, 1, 2], np.uint64), [0, 2, 1, 2], ("0", "1", "2")),
        (np.array([[0], [2], [1], [2]]), [0, 2, 1, 2], ("0", "1", "2")),
        (["cow", "ant", "bee", "ant"], [2, 0, 1, 0], ("ant", "bee", "cow")),
        ([b"cow", b"ant", b"bee", b"ant"], [2, 0, 1, 0], ("ant", "bee", "cow")),
        ([True, False, True, False], [1, 0, 1, 0], ("0", "1")),
        (ONE_HOT, [0, 2, 1, 2], ("0", "1", "2")),
        (ONE_HOT.astype(bool), [0, 2, 1, 2], ("0", "1", "2")),
    ],
)
def test_labels_become_codes_and_keep_their_names(
    tmp_path: Path, labels: Any, codes: list[int], classes: tuple[str, ...]
) -> None:
    dataset = load(tmp_path, labels)
    assert dataset.train.y.tolist() == dataset.test.y.tolist() == codes
    assert dataset.train.y.dtype == np.int64
    assert dataset.classes == classes


def test_what_is_left_out_is_said(tmp_path: Path) -> None:
    assert load(tmp_path, [0, 2, 3]).notes == (
        "no sample has the labels 1: they are left out; the 3 classes keep their names",
    )
    said = load(tmp_path, [10, 39]).notes[0]
    assert said.startswith("no sample has the labels 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, ... (38 in all)")
    dataset = load(tmp_path, [2, 0], classes=["ant", "bee", "cow"])
    assert dataset.classes == ("ant", "cow")
    assert dataset.notes == ("no sample has the classes bee: they are left out; the 2 classes keep their names",)
    assert "one-hot" in load(tmp_path, ONE_HOT).notes[0]
    assert load(tmp_path, [0, 1]).notes == ()


def test_a_class_of_one_half_alone_is_a_class(tmp_path: Path) -> None:
    dataset = load(tmp_path, [5, 9], [7, 9])
    assert dataset.classes == ("5", "7", "9")
    assert dataset.train.y.tolist() == [0, 2]
    assert dataset.test.y.tolist() == [1, 2]


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, 10**9], r"label 1000000000: must be below 65536, there being 4 samples; .* stored as strings"),
        (np.array([0, 2**64 - 1], np.uint64), r"label 18446744073709551615: must be below"),
        ([-1, 1], r"labels -1\.\.1: must be >= 0"),
        ([0.5, 1.0], r"label 0\.5 of sample 0 is no whole number"),
        ([0.0, np.nan], r"label nan of sample 1 is no whole number"),
        ([1j, 2j], r"labels of shape \(2,\) and complex128"),
        ([[1, 1], [0, 1]], r"labels of shape \(2, 2\) and int64: must be \(N,\), or one-hot"),
        ([[0.2, 0.8], [0, 1]], r"one-hot rows with a single 1 each"),
        (np.zeros((2, 0)), r"one-hot rows"),
        (np.array(["2020", "2021"], "datetime64[Y]"), r"labels of shape \(2,\) and datetime64"),
    ],
)
def test_labels_that_are_no_classes_are_refused(tmp_path: Path, labels: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        load(tmp_path, labels)
    assert "\n" not in str(caught.value)


def test_names_that_nobody_declared_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="labels dog are none of the 2 class names"):
        load(tmp_path, ["ant", "dog"], classes=["ant", "bee"])
    with pytest.raises(ValueError, match="strings in one half and numbers in the other"):
        load(tmp_path, ["ant", "dog"], [0, 1])
