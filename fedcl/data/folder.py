"""Images in folders, one for each class."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedcl.config.value_rules import ConfigError
from fedcl.data.assembly import (
    MOST_PIXELS,
    Half,
    Size,
    assemble,
    resolve,
    stack_images,
    stratified,
)
from fedcl.data.dataset import Dataset
from fedcl.data.reading import entries, opened

_ENDINGS = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp")
_FORMATS = ("PNG", "JPEG", "BMP", "GIF", "WEBP")
_TEST_NAMES = ("test", "val", "validation")
_FOREIGN = (
    "__MACOSX",
    "@eaDir",
    "$RECYCLE.BIN",
    "System Volume Information",
    "lost+found",
)  # what systems leave behind
_FRACTION = 0.2


def folder(
    *,
    root: str,
    test_fraction: float | None = None,
    seed: int = 0,
    size: Size = None,
    grey: bool | None = None,
    mean: Sequence[float] = (0.0,),
    std: Sequence[float] = (1.0,),
) -> Dataset:
    """Load ``train/CLASS/*.png`` and ``test/CLASS/*.png`` (or ``val``) as uint8 of shape (N, C, H, W).

    Where there is no ``train``, the folders of ``root`` are the classes, and a part of each is the test half. Classes
    are the folders of ``train`` that hold images, in the order of their names; samples are in the order of theirs. PNG,
    JPEG, BMP, GIF (its first frame) and WebP are read. What is hidden, and ``__MACOSX``, is no class and no image.

    Parameters
    ----------
    root
        The folder that holds ``train`` and ``test``, or the classes.
    test_fraction
        Share of each class that becomes the test half where there are no halves, at least one image; None is 0.2.
    seed
        Draws that split. It is the source's own, so runs with different seeds share their test half.
    size
        Side or [height, width] to which images are resized, bilinearly; None needs images of one size.
    grey
        Whether images get one channel or three; None takes one if the first image has one.
    mean, std
        Normalisation on the [0, 1] scale.

    Raises
    ------
    ValueError
        Pillow is not installed, a folder is missing, there is no image, one is damaged, no file, of another size, or of
        a class that ``train`` lacks, or there is a ``test_fraction`` and a test folder.
    """
    passed: list[str] = []
    train, test = _halves(resolve(root), root)
    files = _images(train, root, passed)
    classes = tuple(files)
    x, y = _read(files, classes, root, size, grey)
    notes: list[str] = []
    if test is None:
        chosen = stratified(y, _FRACTION if test_fraction is None else test_fraction, seed)
        halves: list[Half] = [(x[~chosen], y[~chosen]), (x[chosen], y[chosen])]
        if test_fraction is None:
            settings = "data.source.test_fraction and data.source.seed"
            notes.append(f"no folders train and test: {_FRACTION:g} of each class is the test half, as {settings} say")
    elif test_fraction is not None:
        raise ConfigError(f"data.source.test_fraction={test_fraction}: must be null, as there is a folder {test.name}")
    else:
        tests = _images(test, root, passed)
        unknown = sorted(tests.keys() - files.keys())
        if unknown:
            raise ConfigError(f"data.root={root}: {test.name} has classes that train lacks: {', '.join(unknown[:5])}")
        halves = [(x, y), _read(tests, classes, root, size, x.shape[1] == 1)]
    return assemble(
        root, halves, scale=1 / 255, mean=mean, std=std, classes=classes, notes=[*notes, *_left_out(passed)]
    )


def _left_out(passed: Sequence[str]) -> list[str]:
    """Return notes on files and folders that are neither class nor image."""
    if not passed:
        return []
    more = f", ... ({len(passed)} in all)" if len(passed) > 10 else ""
    return [f"passed over, being no image, hidden, or a folder without images: {', '.join(passed[:10])}{more}"]


def _halves(base: Path, root: str) -> tuple[Path, Path | None]:
    """Return the folders of both halves; without a second one, the first is to be split."""
    train = base / "train"
    tests = [base / name for name in _TEST_NAMES if _folders(base / name, root)]
    if _folders(train, root):
        found = next((base / name for name in _TEST_NAMES if (base / name).is_dir()), None)
        if found is None:
            raise ConfigError(
                f"data.root={root}: the folder test is missing; must hold test/CLASS/IMAGE; to split train, use "
                f"data.root={train}"
            )
        return train, found
    if tests or not _folders(base, root):
        raise ConfigError(f"data.root={root}: the folder train is missing; must hold train/CLASS/IMAGE, or CLASS/IMAGE")
    return base, None


def _folders(path: Path, root: str) -> list[Path]:
    """Return the folders in a folder that can be classes."""
    return [each for each in entries(path, root) if each.is_dir() and _visible(each)] if path.is_dir() else []


def _visible(path: Path) -> bool:
    return not path.name.startswith(".") and path.name not in _FOREIGN


def _images(half: Path, root: str, passed: list[str]) -> dict[str, list[Path]]:
    """Return the images of each class that has any; other files are added to ``passed``."""
    found: dict[str, list[Path]] = {}
    for each in entries(half, root):
        if not each.is_dir() or not _visible(each):
            passed.append(each.name)
            continue
        held = entries(each, root)
        images = [file for file in held if file.suffix.lower() in _ENDINGS and _visible(file)]
        passed += [f"{each.name}/{file.name}" for file in held if file not in images] if images else [f"{each.name}/"]
        if images:
            found[each.name] = images
    if not found:
        raise ConfigError(f"data.root={root}: the folder {half.name} holds no image; must hold CLASS/IMAGE")
    return found


def _read(
    files: Mapping[str, Sequence[Path]], classes: Sequence[str], root: str, size: Size, grey: bool | None
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Return the images (N, C, H, W) and labels (N,) of a half."""
    labels = [classes.index(name) for name, held in files.items() for _ in held]
    images = _opened([file for held in files.values() for file in held], root)
    return stack_images(images, len(labels), root=root, size=size, grey=grey), np.array(labels, np.int64)


def _opened(files: Sequence[Path], root: str) -> Iterator[tuple[str, Any]]:
    try:
        from PIL import Image
    except ImportError as error:
        raise ValueError("data=folder: needs the package pillow: pip install 'fedcl[sim]'") from error
    for file in files:
        name = f"{file.parent.name}/{file.name}"
        with opened(file, root, "is damaged or no image", name=name) as stream, warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the bound below is a stricter one
            image = Image.open(stream, formats=_FORMATS)
            if image.width * image.height > MOST_PIXELS:
                sides = f"{image.height}x{image.width}"
                raise ConfigError(f"data.root={root}: {name} is {sides}; must have {MOST_PIXELS} pixels at most")
            image.load()
            yield name, image
