"""Which errs more, inversion or staleness? Told afterwards, when a client's next update has come."""

from __future__ import annotations

from typing import Any

from torch import Tensor

# P = parameters
DECAY = 0.9  # of the moving means


class Hindsight:
    """Moving means, over clients, of the relative L1 errors of two guesses at an update that has come since.

    Wang and Gao (AAAI 2025) compare likewise before they switch back. They count for one task: a new one starts again.

    Parameters
    ----------
    after
        Comparisons within a task before :meth:`prefers_late` says anything; None: it never does.
    """

    def __init__(self, after: int | None) -> None:
        self.after = after
        self.errors: dict[str, float] = {}

    def compare(self, task: int, predicted: Tensor, late: Tensor, true: Tensor) -> dict[str, float]:
        """Compare what inversion ``predicted`` (P,) and the ``late`` change (P,) with the ``true`` one (P,).

        Returns the relative L1 errors of both guesses; nothing where nothing was learned.
        """
        size = float(true.abs().sum())
        if size == 0:
            return {}
        if self.errors.get("task") != task:
            self.errors = {"task": task, "compared": 0}
        first = self.errors["compared"] == 0
        errors = {}
        for name, guess in (("inverted", predicted), ("late", late)):
            errors[name] = error = float((guess.double() - true).abs().sum()) / size
            self.errors[name] = error if first else DECAY * self.errors[name] + (1 - DECAY) * error
        self.errors["compared"] += 1
        return errors

    def prefers_late(self, task: int) -> bool:
        """Whether inversion has erred more than staleness so far in ``task``."""
        errors = self.errors
        if self.after is None or errors.get("task") != task or errors["compared"] < self.after:
            return False
        return errors["inverted"] > errors["late"]

    def metrics(self) -> dict[str, float]:
        return {f"hindsight_{name}": self.errors[name] for name in ("inverted", "late") if name in self.errors}

    def state_dict(self) -> dict[str, Any]:
        return dict(self.errors)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.errors = dict(state)
