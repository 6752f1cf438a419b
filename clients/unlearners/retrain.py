"""Retraining: the same run, as if nobody had ever held the forget set. Exact, and the yardstick of all others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from fedcl.contracts.requests import ForgetRequest
from fedcl.contracts.unlearner import Unlearner, UnlearnView

if TYPE_CHECKING:
    from torch import Tensor

    from fedcl.contracts.strategy import Target


class Retrain(Unlearner):
    """Run every round again: same initial weights, selection and draws, without the forget set.

    What the run keeps besides its models (moments, bases, personal models, clients' states) becomes that run's too.
    """

    guarantee = "exact"
    retrains = True

    def unlearn(
        self, requests: Sequence[ForgetRequest], models: Mapping[Target, Tensor], view: UnlearnView
    ) -> dict[Target, Tensor]:
        return view.retrain()
