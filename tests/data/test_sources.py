from __future__ import annotations

import gzip
import os
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedcl.assembly import load_dataset
from fedcl.config.compose import compose
from fedcl.data.sources import digits, idx, npz

NAMES = {
    "x_train": "train-images-idx3-ubyte",
    "y_train": "train-labels-idx1-ubyte",
    "x_test": "t10k-images-idx3-ubyte",
    "y_test": "t10k-labels-idx1-ubyte",
}
ARRAYS = {
    "x_train": np.arange(5 * 2 * 3, dtype=np.uint8).reshape(5, 2, 3),
    "y_train": np.array([0, 2, 1, 1, 0], np.uint8),
    "x_test": np.full((2, 2, 3), 255, np.uint8),
    "y_test": np.array([1, 0], np.uint8),
}
needs_data = pytest.mark.skipif(
    "FEDCL_DATA" not in os.environ, reason="FEDCL_DATA does not name a folder with the real data sets"
)


def encoded(array: np.ndarray[Any, np.dtype[np.uint8]]) -> bytes:
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()


def write_idx(folder: Path, *, zipped: bool = False, **changed: bytes) -> str:
    for key, name in NAMES.items():
        content = changed.get(key, encoded(ARRAYS[key]))
        if zipped:
            (folder / f"{name}.gz").write_bytes(gzip.compress(content))
        else:
            (folder / name).write_bytes(content)
    return str(folder)


@pytest.mark.parametrize("zipped", [False, True])
def test_idx_reads_what_was_written(tmp_path: Path, zipped: bool) -> None:
    dataset = idx(root=write_idx(tmp_path, zipped=zipped), mean=(0.5,), std=(0.25,))
    assert dataset.train.x.dtype == np.uint8
    assert dataset.train.x.shape == (5, 1, 2, 3)
    assert dataset.input_shape == (1, 2, 3)
    assert np.array_equal(dataset.train.x[:, 0], ARRAYS["x_train"])
    assert dataset.train.y.dtype == np.int64
    assert dataset.train.y.tolist() == [0, 2, 1, 1, 0]
    assert dataset.classes == ("0", "1", "2")
    # White is 1 on the [0, 1] scale: (1 - 0.5) / 0.25 = 2.
    np.testing.assert_allclose(dataset.normalise(dataset.test.x), 2.0, rtol=1e-6)


def test_limits_take_the_first_samples(tmp_path: Path) -> None:
    dataset = idx(root=write_idx(tmp_path), train_limit=3, test_limit=99, classes=("a", "b", "c", "d"))
    assert dataset.train.y.tolist() == [0, 2, 1]
    assert np.array_equal(dataset.train.x[:, 0], ARRAYS["x_train"][:3])
    assert len(dataset.test) == 2
    assert dataset.classes == ("a", "b", "c")  # nothing is a d
    assert dataset.notes == ("no sample has the classes d: they are left out; the 3 classes keep their names",)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"x_train": encoded(ARRAYS["y_train"])}, r"train-images-idx3-ubyte starts with 00000801, must be 00000803"),
        ({"x_train": b"GIF89a"}, "starts with 47494638"),
        ({"y_test": b""}, "t10k-labels-idx1-ubyte starts with"),
        ({"x_test": encoded(ARRAYS["x_test"])[:-1]}, "t10k-images-idx3-ubyte is cut short"),
        ({"x_test": encoded(ARRAYS["x_test"])[:9]}, "t10k-images-idx3-ubyte is cut short"),
        ({"y_train": encoded(ARRAYS["y_train"][:4])}, "5 samples with labels of shape"),
        ({"x_test": encoded(np.zeros((2, 3, 3), np.uint8))}, "differ in shape"),
    ],
)
def test_idx_says_what_is_wrong_with_a_file(tmp_path: Path, changed: dict[str, bytes], message: str) -> None:
    root = write_idx(tmp_path, **changed)
    with pytest.raises(ValueError, match=message) as caught:
        idx(root=root)
    assert f"data.root={root}" in str(caught.value)


def test_idx_says_what_is_missing_or_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FEDCL_DATA", raising=False)
    with pytest.raises(ValueError, match=r"data\.root=.*nowhere: does not exist, and FEDCL_DATA is not set"):
        idx(root=str(tmp_path / "nowhere"))
    root = write_idx(tmp_path, zipped=True)
    broken = tmp_path / f"{NAMES['x_train']}.gz"
    broken.write_bytes(broken.read_bytes()[:-12])
    with pytest.raises(ValueError, match=r"train-images-idx3-ubyte\.gz is damaged"):
        idx(root=root)
    broken.write_bytes(b"no gzip at all")
    with pytest.raises(ValueError, match=r"train-images-idx3-ubyte\.gz is damaged"):
        idx(root=root)
    broken.unlink()
    with pytest.raises(ValueError, match=r"file train-images-idx3-ubyte or .*\.gz is missing"):
        idx(root=root)
    with pytest.raises(ValueError, match="must be a folder"):
        idx(root=str(tmp_path / f"{NAMES['y_train']}.gz"))


def test_classes_and_normalisation_must_fit(tmp_path: Path) -> None:
    root = write_idx(tmp_path)
    with pytest.raises(ValueError, match=r"labels 0\.\.2 do not fit the 2 data\.source\.classes"):
        idx(root=root, classes=("a", "b"))
    with pytest.raises(ValueError, match=r"data\.source\.mean="):
        idx(root=root, mean=(0.1, 0.2))
    with pytest.raises(ValueError, match=r"data\.source\.std="):
        idx(root=root, std=(0.0,))


def test_relative_roots_are_looked_for_in_fedcl_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine").mkdir()
    write_idx(tmp_path / "mine")
    monkeypatch.setenv("FEDCL_DATA", str(tmp_path))
    assert len(idx(root="mine").train) == 5
    with pytest.raises(ValueError, match=r"data\.root=yours: does not exist, neither here nor in FEDCL_DATA="):
        idx(root="yours")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("FEDCL_DATA")
    assert len(idx(root="mine").train) == 5


@pytest.mark.parametrize(("archive", "name"), [("x.npz", "npz"), ("folder", "idx")])
def test_root_must_be_given(archive: str, name: str) -> None:
    with pytest.raises(ValueError, match=r"data\.root=null"):
        {"npz": npz, "idx": idx}[name](root=None)  # type: ignore[arg-type]


def test_npz_moves_channels_first(tmp_path: Path) -> None:
    x = np.arange(2 * 4 * 5 * 3, dtype=np.uint8).reshape(2, 4, 5, 3)
    np.savez(tmp_path / "a.npz", x_train=x, y_train=[0, 1], x_test=x[:1], y_test=[1], classes=["cat", "dog"])
    dataset = npz(root=str(tmp_path / "a.npz"), mean=(0.0, 0.0, 1.0), std=(1.0, 1.0, 1.0))
    assert dataset.input_shape == (3, 4, 5)
    assert dataset.train.x[1, 2, 3, 4] == x[1, 3, 4, 2]
    assert dataset.classes == ("cat", "dog")
    assert dataset.scale == 1 / 255
    np.testing.assert_allclose(dataset.normalise(dataset.test.x)[0, 2, 0, 0], x[0, 0, 0, 2] / 255 - 1, rtol=1e-6)


def test_npz_takes_flat_floats_and_grey_images(tmp_path: Path) -> None:
    flat = np.linspace(0, 1, 12).reshape(3, 4)
    np.savez(tmp_path / "flat.npz", x_train=flat, y_train=np.array([0, 1, 2], np.uint8), x_test=flat, y_test=[0, 1, 2])
    dataset = npz(root=str(tmp_path / "flat.npz"), train_limit=2)
    assert dataset.train.x.dtype == np.float32
    assert dataset.train.x.shape == (2, 4)
    assert (dataset.scale, dataset.num_classes) == (1.0, 3)
    grey = np.zeros((3, 6, 7), np.uint8)
    np.savez(tmp_path / "grey.npz", x_train=grey, y_train=[0, 1, 2], x_test=grey, y_test=[0, 1, 2])
    assert npz(root=str(tmp_path / "grey.npz")).input_shape == (1, 6, 7)


def test_npz_refuses_pickles_and_incomplete_archives(tmp_path: Path) -> None:
    path = tmp_path / "bad.npz"
    np.savez(path, x_train=np.array([{}], dtype=object), y_train=[0], x_test=np.zeros((1, 2)), y_test=[0])
    with pytest.raises(ValueError, match="not an npz archive of plain arrays: x_train holds Python objects"):
        npz(root=str(path))
    with path.open("wb") as stream:
        np.save(stream, np.zeros(3))
    with pytest.raises(ValueError, match=r"not an npz archive but a single array \(\.npy\)"):
        npz(root=str(path))
    path.write_bytes(b"PK\x03\x04 nonsense")
    with pytest.raises(ValueError, match="not an npz archive"):
        npz(root=str(path))
    np.savez(path, x_train=np.zeros((1, 2)), y_test=[0])
    with pytest.raises(ValueError, match="lacks y_train, x_test"):
        npz(root=str(path))
    np.savez(path, x_train=np.zeros((1, 2)), y_train=[0.5], x_test=np.zeros((1, 2)), y_test=[0])
    with pytest.raises(ValueError, match=r"label 0\.5 of sample 0 is no whole number"):
        npz(root=str(path))
    np.savez(path, x_train=np.zeros(3), y_train=[0], x_test=np.zeros(3), y_test=[0])
    with pytest.raises(ValueError, match=r"samples have shape \(3,\)"):
        npz(root=str(path))


def test_digits_are_split_by_class_and_not_by_the_run() -> None:
    dataset = digits()
    assert dataset.input_shape == (1, 8, 8)
    assert dataset.train.x.dtype == np.float32
    assert len(dataset.train) + len(dataset.test) == 1797
    counts = np.bincount(dataset.test.y) / (np.bincount(dataset.test.y) + np.bincount(dataset.train.y))
    np.testing.assert_allclose(counts, 0.2, atol=0.003)
    assert dataset.normalise(dataset.train.x).max() == 1.0
    assert np.array_equal(digits().test.x, dataset.test.x)
    assert not np.array_equal(digits(seed=1).test.x, dataset.test.x)


def test_digits_refuse_files() -> None:
    with pytest.raises(ValueError, match=r"data\.root=here: must be null"):
        digits(root="here")


@needs_data
@pytest.mark.parametrize(("root", "mean", "std"), [("mnist", 0.1307, 0.3081), ("fashion_mnist", 0.2860, 0.3530)])
def test_real_idx_files_have_the_published_statistics(root: str, mean: float, std: float) -> None:
    dataset = idx(root=root, mean=(mean,), std=(std,))
    assert (len(dataset.train), len(dataset.test)) == (60_000, 10_000)
    assert dataset.input_shape == (1, 28, 28)
    assert np.bincount(dataset.test.y).sum() == 10_000
    # Not every tenth: MNIST alternates between two groups of writers, and even positions are darker than odd ones.
    x = dataset.train.x[::7].astype(np.float64) / 255
    assert x.mean() == pytest.approx(mean, abs=2e-3)
    assert x.std() == pytest.approx(std, abs=2e-3)


@needs_data
def test_real_cifar_subset() -> None:
    dataset = npz(root="cifar100_subset.npz", mean=(0.5071, 0.4865, 0.4409), std=(0.2673, 0.2564, 0.2762))
    assert dataset.input_shape == (3, 32, 32)
    assert np.bincount(dataset.train.y).tolist() == [100] * 100
    assert np.bincount(dataset.test.y).tolist() == [50] * 100
    assert dataset.classes[:2] == ("apple", "aquarium_fish")
    normalised = dataset.normalise(dataset.train.x)
    np.testing.assert_allclose(normalised.mean((0, 2, 3)), 0.0, atol=0.03)
    np.testing.assert_allclose(normalised.std((0, 2, 3)), 1.0, atol=0.03)


def write_npz(folder: Path, **more: Any) -> str:
    np.savez(folder / "own.npz", **ARRAYS, classes=np.array(["ant", "bee", "cow"]), **more)
    return str(folder / "own.npz")


def test_npz_pairs_of_further_arrays_are_columns(tmp_path: Path) -> None:
    root = write_npz(
        tmp_path, writer_train=np.arange(5), writer_test=np.array([7, 8]), odd_train=np.zeros(5), note=np.zeros(1)
    )
    dataset = npz(root=root, train_limit=3)
    assert dataset.train.meta["writer"].tolist() == [0, 1, 2]
    assert dataset.test.meta["writer"].tolist() == [7, 8]
    assert set(dataset.train.meta) == {"writer"}
    with pytest.raises(ValueError, match=r"5 samples with a column writer of shape \(4,\)"):
        npz(root=write_npz(tmp_path, writer_train=np.arange(4), writer_test=np.arange(2)))


def test_npz_superclasses_follow_the_class_names(tmp_path: Path) -> None:
    root = write_npz(tmp_path)
    dataset = npz(root=root, superclasses={"insect": ["bee", "ant"], "mammal": ["cow"]})
    assert dataset.train.meta["superclass"].tolist() == ["insect", "mammal", "insect", "insect", "insect"]
    assert dataset.test.meta["superclass"].tolist() == ["insect", "insect"]
    for wrong in (
        {"insect": ["ant", "bee"]},
        {"all": ["ant", "bee", "cow", "dog"]},
        {"twice": ["ant", "bee", "cow", "cow"]},
    ):
        with pytest.raises(ValueError, match=r"data\.source\.superclasses: must name each class once"):
            npz(root=root, superclasses=wrong)


@needs_data
def test_cifar100s_superclasses_have_five_classes_each() -> None:
    dataset = load_dataset(compose(["data=cifar100_subset"]))
    names, counts = np.unique(dataset.train.meta["superclass"], return_counts=True)
    assert len(names) == 20
    assert set(counts.tolist()) == {500}
    of = dict(zip((dataset.classes[label] for label in dataset.test.y), dataset.test.meta["superclass"], strict=True))
    assert (of["oak_tree"], of["shark"], of["rocket"]) == ("trees", "fish", "vehicles_2")
