"""LiNeS at the server: what a task has changed is scaled layer by layer when the task ends.

Wang et al., "LiNeS: Post-training Layer Scaling Prevents Forgetting and Enhances Model Merging", ICLR 2025: the change
of layer l of L since the task began is multiplied by ``alpha + (1 - alpha) l / (L - 1)``, so that shallow layers, which
tasks share, keep least.
"""

# P = length of the flat vector
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fedcl.contracts.requests import ErasureOutcome, ForgetRequest
from fedcl.contracts.strategy import Event, Projection, Target
from fedcl.contracts.view import ServerView
from fedcl.models.flat import Spec
from fedcl.models.merge import layer_factors, scaled_change


class LiNeS(Projection):
    """At a task's end put each model back towards where the task found it, shallow layers further.

    Where the server keeps personal models, each is scaled as the global one is.

    Parameters
    ----------
    shallow
        alpha, what the first layer keeps of its change; the last, all heads together, keeps all. 1 changes nothing.
    first_task
        Whether the first task is scaled too: the paper starts from a trained model, which a network with random
        weights is not.
    """

    def __init__(self, *, shallow: float = 0.5, first_task: bool = False) -> None:
        self.shallow = shallow
        self.first_task = first_task
        self._base: dict[Target, Tensor] = {}
        self._tasks = 0
        self._factors_P = torch.zeros(0)

    def setup(self, spec: Spec) -> None:
        self._factors_P = layer_factors(spec, self.shallow).double()

    def apply(self, target: Target, change: Tensor, view: ServerView) -> Tensor:
        """Let every change pass, and remember where the task found the target."""
        if target not in self._base:
            self._base[target] = view.model_at(target).clone()
        return change

    def finalize(self, event: Event, view: ServerView) -> dict[Target, Tensor]:
        """Scale what the task has changed, and begin the next from there."""
        if event.kind != "task_end":
            return {}
        bases, self._base = self._base, {}
        self._tasks += 1
        if self.shallow == 1.0 or (self._tasks == 1 and not self.first_task):
            return {}
        return {target: self._scaled(base, view.model_at(target)) for target, base in bases.items()}

    def _scaled(self, base_P: Tensor, model_P: Tensor) -> Tensor:
        return scaled_change(base_P.double(), model_P.double(), self._factors_P).float()

    def forget(self, request: ForgetRequest) -> ErasureOutcome:
        """Drop the models the task began with: they hold what is to be forgotten, and the next change begins again."""
        if not self._base:
            return super().forget(request)
        self._base = {}
        return ErasureOutcome(
            type(self).__name__, "reset", "models that the present task began with; it begins again now"
        )

    def state_dict(self) -> dict[str, Any]:
        """Return where the present task found each target, and how many tasks have ended."""
        return {"base": dict(self._base), "tasks": self._tasks}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._base, self._tasks = dict(state["base"]), state["tasks"]
