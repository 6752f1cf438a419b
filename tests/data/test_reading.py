"""Files that are none, and headers that announce what is not there: one line each, and no memory taken."""

from __future__ import annotations

import gzip
import io
import os
import pickle
import struct
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedcl.data.cifar import cifar
from fedcl.data.dataset import Dataset
from fedcl.data.folder import folder
from fedcl.data.reading import read_idx
from fedcl.data.sources import idx, npz
from fedcl.data.text import text
from tests.data.test_sources import ARRAYS, NAMES, write_idx

HUGE = 1 << 40


def refused(read: Callable[[], Any]) -> str:
    """Return the one line with which a file is refused, and see that nothing much was allocated for it."""
    tracemalloc.start()
    try:
        with pytest.raises(ValueError) as caught:  # noqa: PT011 the caller looks at the message
            read()
        assert tracemalloc.get_traced_memory()[1] < 64 << 20
    finally:
        tracemalloc.stop()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def npy(shape: tuple[int, ...], dtype: str = "|u1", body: bytes = b"") -> bytes:
    """Return an npy file whose header may lie."""
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, {"descr": dtype, "fortran_order": False, "shape": shape})
    return stream.getvalue() + body


def archive(path: Path, packing: int = zipfile.ZIP_STORED, **members: bytes) -> str:
    whole = {name: np.asarray(array) for name, array in ARRAYS.items()}
    with zipfile.ZipFile(path, "w", packing) as target:
        for name in {*whole, *members}:
            stream = io.BytesIO()
            np.save(stream, whole.get(name, np.zeros(1)))
            target.writestr(f"{name}.npy", members.get(name, stream.getvalue()))
    return str(path)


@pytest.mark.parametrize(
    ("member", "message"),
    [
        (npy((HUGE, 2, 3)), "x_train announces [1099511627776, 2, 3] of uint8, more than the file holds"),
        (npy((5, 2, 3), "<f8", bytes(30)), "x_train announces [5, 2, 3] of float64, more than the file holds"),
        (npy((5, 2, 3), body=bytes(31)), "x_train announces [5, 2, 3] of uint8, and holds another number of bytes"),
        (npy((-5, 2, 3)), "x_train announces [-5, 2, 3]"),
        (npy((5,), "|O", bytes(40)), "x_train holds Python objects"),
        (npy((5, 2, 3))[:20], "x_train"),
        (b"", "x_train"),
        (b"no array at all", "x_train"),
    ],
)
@pytest.mark.parametrize("packing", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_an_array_that_announces_what_it_does_not_hold(
    tmp_path: Path, member: bytes, message: str, packing: int
) -> None:
    root = archive(tmp_path / "a.npz", packing, x_train=member)
    said = refused(lambda: npz(root=root))
    assert said.startswith(f"data.root={root}: not an npz archive of plain arrays: ")
    assert message in said


def test_an_archive_whose_directory_lies_about_sizes(tmp_path: Path) -> None:
    """A zip bomb that is none: the directory says that a member of a few bytes unpacks to far more than there is."""
    path = tmp_path / "a.npz"
    archive(path, zipfile.ZIP_DEFLATED, x_train=npy((HUGE,)))
    data = bytearray(path.read_bytes())
    at = data.index(b"x_train.npy", data.index(b"PK\x01\x02")) - 46
    data[at + 24 : at + 28] = struct.pack("<I", 0xFFFFFFF0)
    path.write_bytes(data)
    assert "x_train" in refused(lambda: npz(root=str(path)))


def test_an_archive_that_unpacks_to_a_pattern_is_refused_unread(tmp_path: Path) -> None:
    """2 GiB of zeros in 2 MiB: the directory alone is made, which is all that may be looked at."""
    path = tmp_path / "a.npz"
    archive(path, zipfile.ZIP_DEFLATED, x_train=npy((2 << 30, 1)) + bytes(4 << 20))
    data = bytearray(path.read_bytes())
    at = data.index(b"x_train.npy", data.index(b"PK\x01\x02")) - 46
    data[at + 20 : at + 24] = struct.pack("<I", 4 << 20)  # so many bytes packed, so that the ratio is possible
    data[at + 24 : at + 28] = struct.pack("<I", (2 << 30) + 128)
    path.write_bytes(bytes(8 << 20) + data)
    said = refused(lambda: npz(root=str(path)))
    assert "x_train unpacks to 2 GiB, 100 times its size and more; store it with numpy.savez" in said


def test_an_empty_archive_and_one_of_other_names_say_what_is_there(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    np.savez(path)
    assert "the archive lacks x_train, y_train, x_test, y_test; it has nothing" in refused(lambda: npz(root=str(path)))
    np.savez(path, images=np.zeros((4, 3)), x_test=np.zeros((4, 3)))
    said = refused(lambda: npz(root=str(path)))
    assert "lacks x_train, y_train, y_test; it has images, x_test" in said
    assert "data.source.keys.x_train=NAME" in said


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (struct.pack(">4B3I", 0, 0, 8, 3, 0xFFFFFFFF, 28, 28), "announces more data, [4294967295, 28, 28], than it"),
        (struct.pack(">4B3I", 0, 0, 8, 3, 5, 2, 3) + bytes(29), "announces more data, [5, 2, 3], than it can hold"),
        (struct.pack(">4B3I", 0, 0, 8, 3, 5, 2, 3) + bytes(31), "holds more data than its header announces"),
        (b"", "starts with"),
    ],
)
def test_an_idx_file_whose_header_lies(tmp_path: Path, content: bytes, message: str) -> None:
    root = write_idx(tmp_path, x_train=content)
    assert message in refused(lambda: idx(root=root))


def test_a_zipped_idx_file_whose_header_lies(tmp_path: Path) -> None:
    for count, message in ((0xFFFFFFFF, "than it can hold"), (340, "than it holds")):
        content = gzip.compress(struct.pack(">4B3I", 0, 0, 8, 3, count, 28, 28) + bytes(1 << 18))
        (tmp_path / f"{NAMES['x_train']}.gz").write_bytes(content)
        said = refused(lambda: read_idx(tmp_path, NAMES["x_train"], ndim=3, limit=None))
        assert message in said


@pytest.mark.parametrize(
    "payload",
    [
        b"\x80\x02r\xff\xff\xff\x7f.",  # remembers nothing at place 2^31 - 1
        b"\x80\x02cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\n\x8a\x06\x00\x00\x00\x00\x00\x01\x85C\x01b\x87R.",
        b"\x80\x04\x8e" + struct.pack("<Q", 1 << 33) + b"x.",  # bytes of 8 GiB
    ],
)
def test_a_pickle_that_asks_for_memory(tmp_path: Path, payload: bytes) -> None:
    (tmp_path / "train").write_bytes(payload)
    assert "train is damaged, or no CIFAR batch" in refused(lambda: cifar(root=str(tmp_path)))


def test_lists_in_lists_are_not_unfolded(tmp_path: Path) -> None:
    nested: list[Any] = [0]
    for _ in range(40):
        nested = [nested] * 2  # 2^40 numbers in a few bytes
    tree = {"data": np.zeros((1, 3072), np.uint8), "fine_labels": nested, "coarse_labels": [0]}
    for name in ("train", "test"):
        (tmp_path / name).write_bytes(pickle.dumps(tree, protocol=2))
    assert "no list of numbers called fine_labels" in refused(lambda: cifar(root=str(tmp_path)))


Read = Callable[[str], Dataset]


def _as_file(place: Path) -> tuple[Path, Read]:
    return place, lambda root: npz(root=root)


def _as_text(place: Path) -> tuple[Path, Read]:
    return place, lambda root: text(root=root)


def _in_idx(place: Path) -> tuple[Path, Read]:
    place.mkdir()
    write_idx(place)
    (place / NAMES["x_train"]).unlink()
    return place / NAMES["x_train"], lambda _: idx(root=str(place))


def _in_cifar(place: Path) -> tuple[Path, Read]:
    place.mkdir()
    return place / "train", lambda _: cifar(root=str(place))


def _in_folder(place: Path) -> tuple[Path, Read]:
    (place / "cat").mkdir(parents=True)
    return place / "cat/x.png", lambda _: folder(root=str(place))


@pytest.mark.parametrize("source", [_as_file, _as_text, _in_idx, _in_cifar, _in_folder])
@pytest.mark.parametrize("kind", ["a named pipe", "a device", "a folder", "a link that leads nowhere", "a loop"])
def test_what_is_no_file_is_named_and_never_waited_for(
    tmp_path: Path, source: Callable[[Path], tuple[Path, Read]], kind: str
) -> None:
    place, read = source(tmp_path / "data")
    if kind == "a named pipe":
        os.mkfifo(place)
    elif kind == "a device":
        place.symlink_to("/dev/zero")
    elif kind == "a folder":
        place.mkdir()
    else:
        place.symlink_to(place if kind == "a loop" else tmp_path / "nothing")
    said = refused(lambda: read(str(place)))
    if "link" in kind or "loop" in kind:
        assert f"{place.name} is a link that leads nowhere" in said or "does not exist" in said or "loop" in said
    else:
        assert f"{place.name} is {kind}; must be a file" in said


@settings(max_examples=150, deadline=None)
@given(changes=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), min_size=1, max_size=4), packed=st.booleans())
def test_whatever_byte_of_an_archive_changes_it_is_read_or_refused_in_a_line(
    tmp_path_factory: pytest.TempPathFactory, changes: list[tuple[float, int]], packed: bool
) -> None:
    path = tmp_path_factory.mktemp("npz") / "a.npz"
    data = bytearray(Path(archive(path, zipfile.ZIP_DEFLATED if packed else zipfile.ZIP_STORED)).read_bytes())
    for where, value in changes:
        data[int(where * (len(data) - 1))] = value
    path.write_bytes(data)
    try:
        dataset = npz(root=str(path))
    except ValueError as error:
        said = str(error)
    else:
        said = ""
        assert dataset.train.x.shape[0] == len(dataset.train.y)
    assert not said or (said.startswith(f"data.root={path}: ") and "\n" not in said)


@settings(max_examples=100, deadline=None)
@given(head=st.binary(min_size=0, max_size=16), body=st.integers(0, 40), limit=st.none() | st.integers(1, 9))
def test_whatever_an_idx_header_says_it_is_read_or_refused_in_a_line(
    tmp_path_factory: pytest.TempPathFactory, head: bytes, body: int, limit: int | None
) -> None:
    place = tmp_path_factory.mktemp("idx")
    (place / "file").write_bytes(b"\x00\x00\x08\x03" + head + bytes(body))
    try:
        array = read_idx(place, "file", ndim=3, limit=limit)
    except ValueError as error:
        said = str(error)
    else:
        said = ""
        assert array.ndim == 3
    assert not said or said.startswith(f"data.root={place}: file ")
