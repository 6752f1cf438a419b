"""The toy's images as CIFAR pickles, as folders of PNG files and as parquet, and a text that five people speak."""

from __future__ import annotations

import importlib.util
import io
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Halves = Mapping[str, NDArray[np.uint8]]  # x_train (N, 16, 16), y_train (N,), and the same for test


def write_sources(folder: Path, halves: Halves) -> dict[str, str]:
    """Write every form into ``folder`` and return its place by the name of the data source."""
    names = [f"class {label}" for label in range(int(halves["y_train"].max()) + 1)]
    _write_cifar(folder, halves, names)
    for half in ("train", "test"):
        for i, (image, label) in enumerate(zip(halves[f"x_{half}"], halves[f"y_{half}"], strict=True)):
            path = folder / "folder" / half / names[label] / f"{i:03}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(path, compress_level=0)
    if importlib.util.find_spec("datasets") is not None:
        _write_parquet(folder / "hf", halves, names)
    (folder / "play.txt").write_text(_run(), encoding="utf-8")
    places = {name: str(folder / name) for name in ("cifar10", "cifar100", "folder", "hf")}
    return {**places, "text": str(folder / "play.txt")}


def _write_cifar(folder: Path, halves: Halves, names: list[str]) -> None:
    trees: dict[str, dict[str, Any]] = {"cifar10/batches.meta": {"label_names": names}}
    trees["cifar100/meta"] = {"fine_label_names": names, "coarse_label_names": ["few", "many"]}
    for half in ("train", "test"):
        wide = halves[f"x_{half}"].repeat(2, axis=1).repeat(2, axis=2)
        rows = np.tile(wide.reshape(len(wide), -1), 3)  # three equal planes
        labels = halves[f"y_{half}"].tolist()
        trees[f"cifar100/{half}"] = {
            "data": rows, "fine_labels": labels, "coarse_labels": [int(label > 2) for label in labels],
        }  # fmt: skip
        for i in range(5):
            part = slice(i, None, 5) if half == "train" else slice(None)
            name = f"cifar10/data_batch_{i + 1}" if half == "train" else "cifar10/test_batch"
            trees[name] = {"data": rows[part], "labels": labels[part]}
    for name, tree in trees.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(pickle.dumps({key.encode(): value for key, value in tree.items()}, protocol=2))


def _write_parquet(folder: Path, halves: Halves, names: list[str]) -> None:
    import datasets

    features = datasets.Features(
        image=datasets.Image(), label=datasets.ClassLabel(names=names), speaker=datasets.Value("int64")
    )
    folder.mkdir()
    for half in ("train", "test"):
        files = []
        for image in halves[f"x_{half}"]:
            stream = io.BytesIO()
            Image.fromarray(image).save(stream, format="png")
            files.append({"bytes": stream.getvalue(), "path": None})
        labels = halves[f"y_{half}"].tolist()
        columns = {"image": files, "label": labels, "speaker": [i % 5 for i in range(len(labels))]}
        table = datasets.Dataset.from_dict(columns, features=features)
        table.to_parquet(folder / f"{half}-00000-of-00001.parquet")


def _run() -> str:
    """Five speakers in turn say a to e in order, from a random letter on: after a letter the next one is known."""
    rng = np.random.default_rng(0)
    lines = []
    for turn in range(40):
        start = int(rng.integers(5))
        spoken = "".join("abcde"[(start + i) % 5] for i in range(5))
        lines.append(f"SPEAKER {'ABCDE'[turn % 5]}:\n{spoken}\n")
    return "".join(lines)
