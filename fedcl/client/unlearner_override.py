"""Another unlearner in place of a run's own, for requests that come when the run is over."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from fedcl.contracts.requests import ErasureOutcome, ForgetRequest
from fedcl.contracts.unlearner import Local, UnlearnContext, Unlearner, UnlearnView
from fedcl.models.flat import FlatModel

if TYPE_CHECKING:
    from fedcl.contracts.strategy import LocalWork, Target, Update
    from fedcl.contracts.view import ServerView


class UnlearnerOverride(Unlearner):
    """``chosen`` processes requests; ``own``, the run's, keeps its state, and forgets too.

    Raises
    ------
    ValueError
        If ``chosen`` must see every round, which are over.
    """

    def __init__(self, own: Unlearner, chosen: Unlearner) -> None:
        if chosen.observes:
            raise ValueError(
                f"unlearner={type(chosen).__name__}: must see every round from the first; it cannot be "
                "chosen for a run that began without it"
            )
        self._own, self._chosen = own, chosen
        self._forgotten: dict[str, ErasureOutcome] = {}
        for name in ("scopes", "guarantee", "retrains", "takes_apart"):
            setattr(self, name, getattr(chosen, name))
        self.observes = own.observes  # type: ignore[misc]

    def check(self, model: FlatModel) -> None:
        self._own.check(model)
        self._chosen.check(model)

    def bind(self, work: LocalWork) -> None:
        self._own.bind(work)
        self._chosen.bind(work)

    def promise(self) -> str:
        return self._chosen.promise()

    def local(self, ctx: UnlearnContext, step: str) -> Local:
        return self._chosen.local(ctx, step)

    def observe(self, updates: Sequence[Update], before: Tensor, view: ServerView) -> None:
        self._own.observe(updates, before, view)

    def unlearn(
        self, requests: Sequence[ForgetRequest], models: Mapping[Target, Tensor], view: UnlearnView
    ) -> dict[Target, Tensor]:
        """Let ``chosen`` edit and ``own`` forget, which nothing else does if a reference is adopted."""
        edited = self._chosen.unlearn(requests, models, view)
        self._forgotten = {request.id: self._own.forget(request) for request in requests}
        return edited

    def metrics(self) -> dict[str, float]:
        return self._chosen.metrics()

    def forget(self, request: ForgetRequest) -> ErasureOutcome:
        """Let both forget, and say what became of the memory of the run's own, if it had any."""
        chosen = self._chosen.forget(request)
        own = self._forgotten.get(request.id, chosen)
        return chosen if own.outcome == "not applicable" else own

    def state_dict(self) -> dict[str, Any]:
        return self._own.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._own.load_state_dict(state)
