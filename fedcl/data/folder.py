"""Images in folders, one for each class."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fedcl.data.assembly import Half, Size, assemble, resolve, stack_images
from fedcl.data.dataset import Dataset

_ENDINGS = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp")
_TEST_NAMES = ("test", "val", "validation")


def folder(
    *,
    root: str,
    size: Size = None,
    grey: bool | None = None,
    mean: Sequence[float] = (0.0,),
    std: Sequence[float] = (1.0,),
) -> Dataset:
    """Load ``train/CLASS/*.png`` and ``test/CLASS/*.png`` (or ``val``) as uint8 of shape (N, C, H, W).

    Classes are the folders of ``train``, in the order of their names; samples are in the order of theirs. PNG, JPEG,
    BMP, GIF (its first frame) and WebP are read.

    Parameters
    ----------
    root
        The folder that holds ``train`` and ``test``.
    size
        Side or [height, width] to which images are resized, bilinearly; None needs images of one size.
    grey
        Whether images get one channel or three; None takes one if the first image has one.
    mean, std
        Normalisation on the [0, 1] scale.

    Raises
    ------
    ValueError
        Pillow is not installed, a folder is missing, there is no image, or one is damaged, of another size, or of a
        class that ``train`` lacks.
    """
    base = resolve(root)
    train = base / "train"
    test = next((base / name for name in _TEST_NAMES if (base / name).is_dir()), base / "test")
    for half in (train, test):
        if not half.is_dir():
            raise ValueError(f"data.root={root}: the folder {half.name} is missing; must hold {half.name}/CLASS/IMAGE")
    classes = sorted(path.name for path in train.iterdir() if path.is_dir())
    unknown = sorted({path.name for path in test.iterdir() if path.is_dir()} - set(classes))
    if unknown:
        raise ValueError(f"data.root={root}: {test.name} has classes that train lacks: {', '.join(unknown[:5])}")
    halves: list[Half] = []
    for half in (train, test):
        files = [(label, file) for label, name in enumerate(classes) for file in _images_in(half / name)]
        x = stack_images(_opened(files, root), root=root, size=size, grey=grey)
        grey = x.shape[1] == 1
        halves.append((x, np.array([label for label, _ in files], np.int64)))
    return assemble(root, halves, scale=1 / 255, mean=mean, std=std, classes=classes)


def _images_in(path: Path) -> list[Path]:
    return sorted(file for file in path.glob("*") if file.suffix.lower() in _ENDINGS)


def _opened(files: Sequence[tuple[int, Path]], root: str) -> Iterator[tuple[str, Any]]:
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError as error:
        raise ValueError("data=folder: needs the package pillow: pip install 'fedcl[sim]'") from error
    for _, file in files:
        name = f"{file.parent.name}/{file.name}"
        try:
            with Image.open(file) as image:
                image.load()
                yield name, image
        except (UnidentifiedImageError, Image.DecompressionBombError, OSError, SyntaxError) as error:
            raise ValueError(f"data.root={root}: {name} is damaged or no image: {error}") from error
