from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

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
    with pytest.raises(ValueError, match="holds no image"):
        folder(root=root)
    save(tmp_path / "train/a/0.png", 4, 4)
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
