from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fedcl.data.hub import hf

needs_datasets = pytest.mark.skipif(importlib.util.find_spec("datasets") is None, reason="datasets is not installed")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if importlib.util.find_spec("datasets") is not None:
        config = pytest.importorskip("datasets").config
        monkeypatch.setattr(config, "HF_DATASETS_CACHE", tmp_path / "cache")
        monkeypatch.setattr(config, "HF_HUB_OFFLINE", True)


def write(folder: Path, **halves: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Write parquet files with images, fine and coarse labels, and writers; return the train images."""
    datasets = pytest.importorskip("datasets")
    rng = np.random.default_rng(0)
    features = datasets.Features(
        img=datasets.Image(),
        fine=datasets.ClassLabel(names=["ant", "bee", "cow"]),
        coarse=datasets.ClassLabel(names=["insect", "mammal"]),
        writer=datasets.Value("string"),
        score=datasets.Value("int64"),
    )
    pictures = {}
    for half, count in halves.items():
        pictures[half] = rng.integers(0, 256, (count, 5, 4, 3), dtype=np.uint8)
        fine = [i % 3 for i in range(count)]
        columns = {
            "img": [Image.fromarray(picture) for picture in pictures[half]],
            "fine": fine,
            "coarse": [label // 2 for label in fine],
            "writer": [f"w{i % 2}" for i in range(count)],
            "score": list(range(count)),
        }
        table = datasets.Dataset.from_dict(columns, features=features)
        table.to_parquet(folder / f"{half}-00000-of-00001.parquet")
    return pictures["train"]


@needs_datasets
def test_columns_are_found_by_type_and_the_others_become_meta(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    pictures = write(folder, train=6, test=3)
    dataset = hf(root=str(folder))
    assert np.array_equal(dataset.train.x, pictures.transpose(0, 3, 1, 2))
    assert dataset.train.x.dtype == np.uint8
    assert dataset.train.y.tolist() == [0, 1, 2, 0, 1, 2]
    assert dataset.classes == ("ant", "bee", "cow")
    assert dataset.train.meta["writer"].tolist() == ["w0", "w1"] * 3
    assert dataset.train.meta["coarse"].tolist() == [0, 0, 1, 0, 0, 1]
    assert set(dataset.test.meta) == {"coarse", "writer", "score"}
    by_writer = hf(root=str(folder), label="writer", size=2, grey=True)
    assert by_writer.classes == ("w0", "w1")
    assert by_writer.test.y.tolist() == [0, 1, 0]
    assert by_writer.test.x.shape == (3, 1, 2, 2)


@needs_datasets
@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"train_split": "learn"}, r"data\.source\.train_split=learn: must be one of .* splits: train, validation"),
        ({"test_split": "test"}, r"data\.source\.test_split=test: must be one of"),
        ({"label": "species"}, r"data\.source\.label=species: must be one of .* columns: img, fine, coarse, writer"),
        ({"label": "score"}, r"the test half has labels that the train half lacks: \['3'\]"),
    ],
)
def test_splits_and_columns_that_are_not_there_are_named(tmp_path: Path, params: dict[str, str], message: str) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    write(folder, train=3, validation=4)
    assert len(hf(root=str(folder)).test) == 4  # "validation" serves where there is no "test"
    with pytest.raises(ValueError, match=message):
        hf(root=str(folder), **params)  # type: ignore[arg-type]


@needs_datasets
def test_without_a_network_the_message_says_what_to_use_instead() -> None:
    with pytest.raises(ValueError, match=r"data\.root=no-such/thing: cannot be loaded") as caught:
        hf(root="no-such/thing")
    assert "data=folder" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_without_the_library_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r"data=hf: needs the package datasets: pip install 'fedcl\[hf\]'"):
        hf(root="owner/name")
