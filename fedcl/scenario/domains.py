"""Domain-incremental streams: all classes in every task, and inputs that change from task to task."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from fedcl.scenario.base import Tasks
from fedcl.scenario.task import Task
from fedcl.scenario.transforms import CORRUPTIONS

Corruption = Literal["noise", "blur", "contrast", "pixelate", "mixed"]
_DIMMEST = 0.3  # contrast of a grey image at full strength


@dataclass(kw_only=True, eq=False, repr=False)
class _Domains(Tasks):
    """All classes in every task, each task seen through its transform; the first one unchanged."""

    @abstractmethod
    def transforms(self) -> Sequence[dict[str, Any]]:
        """Return the transform of each task but the first."""

    def make_tasks(self) -> Sequence[Task]:
        """Return a task for each transform."""
        labels = tuple(range(self.num_classes))
        transforms = enumerate([None, *self.transforms()])
        return [Task(k, labels, labels, transform=transform) for k, transform in transforms]

    def _grades(self, most: float) -> list[float]:
        """Return the strength of each task but the first, evenly up to ``most``."""
        return [most * k / (self.num_tasks - 1) for k in range(1, self.num_tasks)]

    def _seeds(self) -> list[int]:
        """Return a seed for each task but the first."""
        return [int(np.random.SeedSequence((self.seed, k)).generate_state(1)[0]) for k in range(1, self.num_tasks)]

    def _require_images(self, scenario: str) -> None:
        if len(self.input_shape) != 3:
            raise ValueError(f"scenario={scenario}: needs images (C, H, W), the samples have {tuple(self.input_shape)}")


@dataclass(kw_only=True, eq=False, repr=False)
class DomainPermuted(_Domains):
    """All classes in every task, seen through a permutation of the input positions (permuted MNIST).

    The first task is not permuted; the others' permutations are drawn from the run's seed.
    """

    def transforms(self) -> Sequence[dict[str, Any]]:
        """Return a permutation for each task but the first."""
        return [{"name": "permute", "seed": seed} for seed in self._seeds()]


@dataclass(kw_only=True, eq=False, repr=False)
class DomainRotated(_Domains):
    """All classes in every task, rotated by degrees spaced evenly from 0 to ``max_degrees`` (rotated MNIST)."""

    max_degrees: float = 180.0

    def transforms(self) -> Sequence[dict[str, Any]]:
        """Return a rotation for each task but the first; ValueError if the samples are not images."""
        self._require_images("domain_rotated")
        return [{"name": "rotate", "degrees": degrees} for degrees in self._grades(self.max_degrees)]


@dataclass(kw_only=True, eq=False, repr=False)
class DomainColoured(_Domains):
    """All classes in every task, in colours that move ever further from the first task's.

    Images of three channels have their hue turned, by up to 180 degrees times ``strength``. Others have no hue: their
    contrast falls, at full strength to 0.3, and their brightness rises by what the contrast lost.
    """

    strength: float = 1.0

    def transforms(self) -> Sequence[dict[str, Any]]:
        """Return a change of colour for each task but the first; ValueError if the samples are not images."""
        self._require_images("domain_coloured")
        if self.input_shape[0] == 3:
            return [{"name": "hue", "degrees": 180.0 * grade} for grade in self._grades(self.strength)]
        lost = self._grades(self.strength * (1.0 - _DIMMEST))
        return [{"name": "tone", "contrast": 1.0 - part, "brightness": part} for part in lost]


@dataclass(kw_only=True, eq=False, repr=False)
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
    """

    corruption: Corruption = "mixed"
    severity: int = 3

    def transforms(self) -> Sequence[dict[str, Any]]:
        """Return a corruption for each task but the first; ValueError if the samples are not images."""
        self._require_images("domain_corrupted")
        transforms: list[dict[str, Any]] = []
        for k, seed in enumerate(self._seeds(), start=1):
            mixed = self.corruption == "mixed"
            kind = CORRUPTIONS[(k - 1) % len(CORRUPTIONS)] if mixed else self.corruption
            grade = self.severity if mixed else -(-self.severity * k // (self.num_tasks - 1))
            transforms.append({"name": kind, "severity": grade} | ({"seed": seed} if kind == "noise" else {}))
        return transforms
