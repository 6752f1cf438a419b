"""Doing nothing but going on without the forget set: what an unlearner must beat."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from fedcl.contracts.requests import ForgetRequest
from fedcl.contracts.unlearner import Unlearner, UnlearnView

if TYPE_CHECKING:
    from torch import Tensor

    from fedcl.contracts.strategy import Target


class ContinueWithout(Unlearner):
    """Leave the models as they are; the clients' further rounds, and ``unlearning.recovery_rounds``, have to do it."""

    guarantee = "none"

    def unlearn(
        self, requests: Sequence[ForgetRequest], models: Mapping[Target, Tensor], view: UnlearnView
    ) -> dict[Target, Tensor]:
        return {}
