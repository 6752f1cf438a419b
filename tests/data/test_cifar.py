from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedcl.data.cifar import PlainUnpickler, cifar

RNG = np.random.default_rng(0)


def images(count: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return RNG.integers(0, 256, (count, 3072), dtype=np.uint8)


class Python2Pickler(pickle._Pickler):  # type: ignore[name-defined,misc]
    """Writes text and arrays the way Python 2's numpy did: everything as bytes, a dtype's flags as 0 and 1."""

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, np.ndarray):
            dtype = Named("numpy", "dtype", (b"u1", 0, 1), (3, b"|", None, None, None, -1, -1, 0))
            state = (1, value.shape, dtype, False, value.tobytes())
            return Global("numpy.core.multiarray", "_reconstruct"), (np.ndarray, (0,), b"b"), state
        if isinstance(value, Named):
            return Global(value.module, value.name), value.arguments, value.state
        return NotImplemented

    def save_global(self, obj: Any, name: str | None = None) -> None:
        if isinstance(obj, Global):
            self.write(pickle.GLOBAL + f"{obj.module}\n{obj.name}\n".encode())
            self.memoize(obj)
        else:
            super().save_global(obj, name)

    def save_bytes(self, value: bytes) -> None:
        self.write(pickle.BINSTRING + len(value).to_bytes(4, "little") + value)
        self.memoize(value)

    dispatch = {**pickle._Pickler.dispatch, bytes: save_bytes}  # type: ignore[attr-defined]  # noqa: RUF012


class Named:
    def __init__(self, module: str, name: str, arguments: tuple[Any, ...], state: Any) -> None:
        self.module, self.name, self.arguments, self.state = module, name, arguments, state


class Global:
    def __init__(self, module: str, name: str) -> None:
        self.module, self.name = module, name

    def __call__(self) -> None: ...

    def __reduce__(self) -> str:
        return self.name


def python2(tree: dict[bytes, Any]) -> bytes:
    stream = io.BytesIO()
    Python2Pickler(stream, protocol=2).dump(tree)
    return stream.getvalue()


def write_hundred(folder: Path, **changed: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    train = {"data": images(6), "fine_labels": [0, 1, 2, 0, 1, 2], "coarse_labels": [0, 0, 1, 0, 0, 1]} | changed
    test = {"data": images(2), "fine_labels": [2, 0], "coarse_labels": [1, 0]}
    meta = {"fine_label_names": ["apple", "bee", "can"], "coarse_label_names": ["alive", "dead"]}
    for name, tree in (("train", train), ("test", test), ("meta", meta)):
        (folder / name).write_bytes(pickle.dumps(tree, protocol=2))
    return train, test


def test_cifar100_gives_images_fine_labels_and_superclasses(tmp_path: Path) -> None:
    train, test = write_hundred(tmp_path)
    dataset = cifar(root=str(tmp_path))
    assert dataset.train.x.shape == (6, 3, 32, 32)
    assert dataset.train.x.dtype == np.uint8
    # A row is the red plane, then green, then blue, each row by row.
    assert dataset.train.x[4, 1, 2, 3] == train["data"][4, 1024 + 2 * 32 + 3]
    assert dataset.test.y.tolist() == [2, 0]
    assert dataset.classes == ("apple", "bee", "can")
    assert dataset.train.meta["superclass"].tolist() == [0, 0, 1, 0, 0, 1]
    assert dataset.test.meta["superclass"].tolist() == test["coarse_labels"]
    assert dataset.mean == (0.5071, 0.4865, 0.4409)
    coarse = cifar(root=str(tmp_path), labels="coarse", train_limit=3)
    assert coarse.classes == ("alive", "dead")
    assert coarse.train.y.tolist() == [0, 0, 1]
    assert len(coarse.train.meta["superclass"]) == 3


@pytest.mark.filterwarnings("error")
def test_cifar10_as_python_2_wrote_it_is_read_without_a_warning(tmp_path: Path) -> None:
    batches = [{b"data": images(2), b"labels": [i % 3, 0], b"batch_label": b"one"} for i in range(6)]
    for name, batch in zip([*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"], batches, strict=True):
        (tmp_path / name).write_bytes(python2(batch))
    (tmp_path / "batches.meta").write_bytes(python2({b"label_names": [b"plane", b"car", b"bird"]}))
    dataset = cifar(root=str(tmp_path), mean=(0.5,), std=(0.25,))
    assert dataset.classes == ("plane", "car", "bird")
    assert dataset.train.y.tolist() == [0, 0, 1, 0, 2, 0, 0, 0, 1, 0]
    assert np.array_equal(dataset.train.x[2:4].reshape(2, -1), batches[1][b"data"])
    assert np.array_equal(dataset.test.x.reshape(2, -1), batches[5][b"data"])
    assert dataset.mean == (0.5,)
    with pytest.raises(ValueError, match=r"data\.source\.labels=coarse"):
        cifar(root=str(tmp_path), labels="coarse")


class Touch:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[Path]]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_a_pickle_that_names_anything_else_is_refused_and_runs_nothing(tmp_path: Path, protocol: int) -> None:
    write_hundred(tmp_path)
    (tmp_path / "train").write_bytes(pickle.dumps({"data": Touch(tmp_path / "owned")}, protocol=protocol))
    with pytest.raises(ValueError, match="train is damaged, or no CIFAR batch: names") as caught:
        cifar(root=str(tmp_path))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize(
    "payload",
    [
        b"cnumpy\nload\n(Vx\ntR.",
        b"cnumpy.core.multiarray\nscalar\n.",
        b"cbuiltins\ngetattr\n.",
        pickle.dumps(np.array([{}], object), protocol=2),
        pickle.dumps(np.array([1 + 2j]), protocol=2),
        b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\ndtype\n(I0\ntVb\ntR.",
    ],
)
def test_only_plain_number_arrays_are_built(payload: bytes) -> None:
    with pytest.raises(pickle.UnpicklingError):
        PlainUnpickler(io.BytesIO(payload), encoding="bytes").load()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"data": np.zeros((6, 3071), np.uint8)}, "uint8 rows of 3072"),
        ({"data": np.zeros((6, 3072), np.float32)}, "uint8 rows of 3072"),
        ({"fine_labels": None}, "no list of numbers called fine_labels"),
        ({"fine_labels": [0, 1]}, "6 samples with labels of shape"),
        ({"fine_labels": [0, 1, 2, 0, 1, 9]}, r"labels 0\.\.9 do not fit the 3"),
        ({"coarse_labels": [0]}, r"a column superclass of shape \(1,\)"),
    ],
)
def test_cifar_says_what_is_wrong(tmp_path: Path, changed: dict[str, Any], message: str) -> None:
    write_hundred(tmp_path, **changed)
    with pytest.raises(ValueError, match=message) as caught:
        cifar(root=str(tmp_path))
    assert f"data.root={tmp_path}" in str(caught.value)


def test_cifar_says_what_is_missing_or_cut_short(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="file data_batch_1 is missing; must be CIFAR's python version"):
        cifar(root=str(tmp_path))
    write_hundred(tmp_path)
    whole = (tmp_path / "test").read_bytes()
    (tmp_path / "test").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="test is damaged"):
        cifar(root=str(tmp_path))
    (tmp_path / "test").write_bytes(pickle.dumps([1]))
    with pytest.raises(ValueError, match="test must hold a dict"):
        cifar(root=str(tmp_path))
    (tmp_path / "test").write_bytes(whole)
    (tmp_path / "meta").write_bytes(pickle.dumps({}))
    with pytest.raises(ValueError, match="no list of label names"):
        cifar(root=str(tmp_path))
