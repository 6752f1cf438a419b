"""Domain-incremental streams: all classes in every task, and inputs that change from task to task."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from fedcl.scenario.base import Tasks, require_tasks
from fedcl.scenario.task import Task
from fedcl.scenario.transforms import CORRUPTIONS, SEVERITIES

Corruption = Literal["noise", "blur", "contrast", "pixelate", "mixed"]
_DIMMEST = 0.3  # contrast of a grey image at full strength


class _Domains(Tasks):
    """All classes in every task, each task seen through its transform; the first one as it is."""

    def __init__(self, transforms: Sequence[dict[str, Any]], num_classes: int) -> None:
        labels = tuple(range(num_classes))
        seen_through: list[dict[str, Any] | None] = [None, *transforms]
        super().__init__(
            [Task(k, labels, labels, transform=transform) for k, transform in enumerate(seen_through)], (num_classes,)
        )


def _grades(num_tasks: int, most: float) -> list[float]:
    """Return the strength of each task but the first, evenly up to ``most``."""
    return [most * k / (num_tasks - 1) for k in range(1, num_tasks)]


def _drawn(seed: int, num_tasks: int) -> list[int]:
    """Return a seed for each task but the first."""
    return [int(np.random.SeedSequence((seed, k)).generate_state(1)[0]) for k in range(1, num_tasks)]


def _require_images(scenario: str, input_shape: Sequence[int]) -> None:
    if len(input_shape) != 3:
        raise ValueError(f"scenario={scenario}: needs images (C, H, W), the samples have {tuple(input_shape)}")


class DomainPermuted(_Domains):
    """All classes in every task, seen through a permutation of the input positions (permuted MNIST).

    The first task is not permuted; the others' permutations are drawn from the run's seed. ValueError for fewer than
    one task.
    """

    def __init__(self, *, num_classes: int, input_shape: Sequence[int], seed: int, num_tasks: int = 5) -> None:
        require_tasks(num_tasks)
        super().__init__([{"name": "permute", "seed": drawn} for drawn in _drawn(seed, num_tasks)], num_classes)


class DomainRotated(_Domains):
    """All classes in every task, rotated by degrees spaced evenly from 0 to ``max_degrees`` (rotated MNIST).

    Raises
    ------
    ValueError
        Samples are no images, ``max_degrees`` is outside (0, 360), or there is less than one task.
    """

    def __init__(
        self,
        *,
        num_classes: int,
        input_shape: Sequence[int],
        seed: int,
        num_tasks: int = 5,
        max_degrees: float = 180.0,
    ) -> None:
        require_tasks(num_tasks)
        if not 0.0 < max_degrees < 360.0:
            raise ValueError(f"scenario.max_degrees={max_degrees}: must be in (0, 360)")
        _require_images("domain_rotated", input_shape)
        super().__init__(
            [{"name": "rotate", "degrees": degrees} for degrees in _grades(num_tasks, max_degrees)], num_classes
        )


class DomainColoured(_Domains):
    """All classes in every task, in colours that move ever further from the first task's.

    Images of three channels have their hue turned, by up to 180 degrees times ``strength``. Others have no hue: their
    contrast falls, at full strength to 0.3, and their brightness rises by what the contrast lost.

    Raises
    ------
    ValueError
        Samples are no images, ``strength`` is outside (0, 1], or there is less than one task.
    """

    def __init__(
        self, *, num_classes: int, input_shape: Sequence[int], seed: int, num_tasks: int = 5, strength: float = 1.0
    ) -> None:
        require_tasks(num_tasks)
        if not 0.0 < strength <= 1.0:
            raise ValueError(f"scenario.strength={strength}: must be in (0, 1]")
        _require_images("domain_coloured", input_shape)
        transforms: list[dict[str, Any]]
        if input_shape[0] == 3:
            transforms = [{"name": "hue", "degrees": 180.0 * grade} for grade in _grades(num_tasks, strength)]
        else:
            lost = _grades(num_tasks, strength * (1.0 - _DIMMEST))
            transforms = [{"name": "tone", "contrast": 1.0 - part, "brightness": part} for part in lost]
        super().__init__(transforms, num_classes)


class DomainCorrupted(_Domains):
    """All classes in every task, images ever more corrupted, or each task in another way.

    The kinds, and five severities of each, are in the spirit of Hendrycks and Dietterich (ICLR 2019), whose benchmark
    has 15; the formulas are those of :mod:`fedcl.scenario.transforms`.

    Parameters
    ----------
    num_tasks
        Number of tasks; the first one is clean.
    corruption
        One kind, whose severity rises evenly from task to task, rounded up; or ``mixed``: the kinds in turn, each at
        full ``severity``.
    severity
        The highest severity, 1 to 5.

    Raises
    ------
    ValueError
        Samples are no images, or a parameter is outside its range.
    """

    def __init__(
        self,
        *,
        num_classes: int,
        input_shape: Sequence[int],
        seed: int,
        num_tasks: int = 5,
        corruption: Corruption = "mixed",
        severity: int = 3,
    ) -> None:
        require_tasks(num_tasks)
        if corruption not in (*CORRUPTIONS, "mixed"):
            raise ValueError(f"scenario.corruption={corruption}: must be one of {', '.join(CORRUPTIONS)}, mixed")
        if severity not in SEVERITIES:
            raise ValueError(f"scenario.severity={severity}: must be in [{SEVERITIES[0]}, {SEVERITIES[-1]}]")
        _require_images("domain_corrupted", input_shape)
        transforms: list[dict[str, Any]] = []
        for k, drawn in enumerate(_drawn(seed, num_tasks), start=1):
            mixed = corruption == "mixed"
            kind = CORRUPTIONS[(k - 1) % len(CORRUPTIONS)] if mixed else corruption
            grade = severity if mixed else -(-severity * k // (num_tasks - 1))
            transforms.append({"name": kind, "severity": grade} | ({"seed": drawn} if kind == "noise" else {}))
        super().__init__(transforms, num_classes)
