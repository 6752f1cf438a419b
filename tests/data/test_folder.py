from __future__ import annotations

import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fedcl.data.assembly import stack_images
from fedcl.data.folder import folder

RNG = np.random.default_rng(0)


def save(path: Path, *shape: int) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    path.parent.mkdir(parents=True, exist_ok=True)
    array = RNG.integers(0, 256, shape, dtype=np.uint8)
    Image.fromarray(array).save(path)
    return array


def test_folders_are_classes_in_order_and_samples_in_the_order_of_their_names(tmp_path: Path) -> None:
    second = save(tmp_path / "train/cat/b.png", 4, 6, 3)
    first = save(tmp_path / "train/cat/a.PNG", 4, 6, 3)
    dog = save(tmp_path / "train/dog/a.bmp", 4, 6, 3)
    save(tmp_path / "test/dog/a.png", 4, 6, 3)
    (tmp_path / "train/cat/notes.txt").write_text("no image")
    dataset = folder(root=str(tmp_path), mean=(0.5,), std=(0.5,))
    assert dataset.classes == ("cat", "dog")
    assert dataset.train.x.shape == (3, 3, 4, 6)
    assert dataset.train.x.dtype == np.uint8
    assert np.array_equal(dataset.train.x, np.stack([first, second, dog]).transpose(0, 3, 1, 2))
    assert dataset.train.y.tolist() == [0, 0, 1]
    assert dataset.test.y.tolist() == [1]
    np.testing.assert_allclose(dataset.normalise(dataset.test.x).max(), dataset.test.x.max() / 127.5 - 1, rtol=1e-5)


def test_grey_images_have_one_channel_unless_asked_otherwise(tmp_path: Path) -> None:
    grey = save(tmp_path / "train/a/0.png", 3, 3)
    save(tmp_path / "val/a/0.png", 3, 3, 3)
    dataset = folder(root=str(tmp_path))
    assert np.array_equal(dataset.train.x, grey[None, None])
    assert dataset.test.x.shape == (1, 1, 3, 3)  # the test half follows the train half
    assert folder(root=str(tmp_path), grey=False).train.x.shape == (1, 3, 3, 3)


def test_images_of_several_sizes_need_one_to_be_named(tmp_path: Path) -> None:
    save(tmp_path / "train/a/0.png", 4, 4)
    save(tmp_path / "train/a/1.jpg", 8, 2)
    save(tmp_path / "test/a/0.png", 4, 4)
    with pytest.raises(ValueError, match=r"a/1\.jpg is 8x2, others are 4x4; set data\.source\.size"):
        folder(root=str(tmp_path))
    assert folder(root=str(tmp_path), size=[2, 6]).train.x.shape == (2, 1, 2, 6)
    assert folder(root=str(tmp_path), size=5).test.x.shape == (1, 1, 5, 5)
    for bad in (0, [2, 3, 4]):
        with pytest.raises(ValueError, match=r"data\.source\.size="):
            folder(root=str(tmp_path), size=bad)


def test_folder_says_what_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = str(tmp_path)
    with pytest.raises(ValueError, match="the folder train is missing"):
        folder(root=root)
    (tmp_path / "train/a").mkdir(parents=True)
    with pytest.raises(ValueError, match="the folder test is missing"):
        folder(root=root)
    (tmp_path / "test").mkdir()
    with pytest.raises(ValueError, match="the folder train holds no image"):
        folder(root=root)
    save(tmp_path / "train/a/0.png", 4, 4)
    with pytest.raises(ValueError, match="the folder test holds no image"):
        folder(root=root)
    save(tmp_path / "test/b/0.png", 4, 4)
    with pytest.raises(ValueError, match="test has classes that train lacks: b"):
        folder(root=root)
    whole = (tmp_path / "train/a/0.png").read_bytes()
    (tmp_path / "train/b").mkdir()
    for broken in (b"no image", whole[:50]):
        (tmp_path / "train/b/0.png").write_bytes(broken)
        with pytest.raises(ValueError, match=rf"data\.root={root}: b/0\.png is damaged or no image"):
            folder(root=root)
    Image.fromarray(np.full((4, 4), 40_000, np.uint16)).save(tmp_path / "train/b/0.png")
    with pytest.raises(ValueError, match="has mode I;16; images must have 8 bits"):
        folder(root=root)
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(ValueError, match="data=folder: needs the package pillow"):
        folder(root=root)


def test_what_systems_leave_behind_is_no_class_and_said_once(tmp_path: Path) -> None:
    for half in ("train", "test"):
        for name in ("cat", "dog", ".ipynb_checkpoints", "__MACOSX", "@eaDir"):
            save(tmp_path / half / name / "a.png", 3, 3)
    (tmp_path / "train/empty").mkdir()
    (tmp_path / "train/cat/within").mkdir()
    for name in ("train/.DS_Store", "train/cat/Thumbs.db", "train/cat/._a.png", "train/cat/scan.tiff"):
        (tmp_path / name).write_bytes(b"no image")
    dataset = folder(root=str(tmp_path))
    assert dataset.classes == ("cat", "dog")
    assert (len(dataset.train), len(dataset.test)) == (2, 2)
    (note,) = dataset.notes
    assert note.startswith("passed over, being no image, hidden, or a folder without images: ")
    for name in (".ipynb_checkpoints", "__MACOSX", "empty/", "cat/scan.tiff", "cat/within", "cat/Thumbs.db"):
        assert name in note


def test_classes_without_halves_are_split_one_by_one(tmp_path: Path) -> None:
    sizes = {"cat": 10, "dog": 5, "eel": 2, "train": 3}  # a class may be called train, if it holds images itself
    for name, count in sizes.items():
        for i in range(count):
            save(tmp_path / name / f"{i}.png", 3, 3)
    dataset = folder(root=str(tmp_path))
    assert dataset.classes == tuple(sizes)
    assert np.bincount(dataset.test.y).tolist() == [2, 1, 1, 1]
    assert np.bincount(dataset.train.y).tolist() == [8, 4, 1, 2]
    assert len(np.unique(np.concatenate([dataset.train.x, dataset.test.x]), axis=0)) == 20
    assert dataset.notes == (
        "no folders train and test: 0.2 of each class is the test half, as data.source.test_fraction and "
        "data.source.seed say",
    )
    again, other = folder(root=str(tmp_path), test_fraction=0.2), folder(root=str(tmp_path), test_fraction=0.2, seed=1)
    assert np.array_equal(again.test.x, dataset.test.x)
    assert not np.array_equal(other.test.x, dataset.test.x)
    assert again.notes == ()
    assert np.bincount(folder(root=str(tmp_path), test_fraction=0.5).test.y).tolist() == [5, 2, 1, 2]


def test_a_fraction_does_not_fit_halves_and_halves_must_both_be_there(tmp_path: Path) -> None:
    save(tmp_path / "test/a/0.png", 3, 3)
    with pytest.raises(ValueError, match="the folder train is missing"):
        folder(root=str(tmp_path))
    save(tmp_path / "train/a/0.png", 3, 3)
    with pytest.raises(ValueError, match=r"data\.source\.test_fraction=0\.5: must be null, as there is a folder test"):
        folder(root=str(tmp_path), test_fraction=0.5)
    with pytest.raises(ValueError, match="the folder train is missing"):
        folder(root=str(tmp_path / "test/a/0.png"))


@pytest.mark.parametrize("content", [b"", b"\x89PNG\r\n\x1a\n", b"%!PS-Adobe-3.0 EPSF-3.0\n", b"RIFF0000WEBPVP8 "])
def test_an_image_that_is_none_is_named(tmp_path: Path, content: bytes) -> None:
    save(tmp_path / "a/0.png", 3, 3)
    (tmp_path / "a/1.png").write_bytes(content)
    with pytest.raises(ValueError, match=r"a/1\.png is damaged or no image") as caught:
        folder(root=str(tmp_path))
    assert "\n" not in str(caught.value)


def test_an_image_that_announces_more_pixels_than_any_has_is_not_decoded(tmp_path: Path) -> None:
    save(tmp_path / "a/0.png", 3, 3)
    data = bytearray((tmp_path / "a/0.png").read_bytes())
    for side in (9_000, 10_000, 60_000):  # Pillow lets the first one pass, warns of the second, refuses the third
        data[16:24] = side.to_bytes(4, "big") * 2
        data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
        (tmp_path / "a/0.png").write_bytes(data)
        with pytest.raises(
            ValueError, match=rf"a/0\.png is ({side}x{side}; must have 67108864 pixels|.* exceeds limit)"
        ):
            folder(root=str(tmp_path))


def test_images_that_would_fill_the_memory_are_refused_after_the_first(tmp_path: Path) -> None:
    for i in range(2):
        save(tmp_path / f"a/{i}.png", 3, 3)
    with pytest.raises(ValueError, match=r"data\.source\.size=100000: must be .* 67108864 at most"):
        folder(root=str(tmp_path), size=100_000)
    images = (("one", Image.new("RGB", (8000, 8000))) for _ in range(1))
    with pytest.raises(ValueError, match=r"1000000 images of 8000x8000 would take 1\.79e\+05 GiB"):
        stack_images(images, 10**6, root="here", size=None, grey=None)
