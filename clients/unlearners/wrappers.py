"""Wrappers around any unlearner: one keeps its edit to few tensors, one takes back what costs too much accuracy.

`Localised` is the general form of editing only where the forget set lives (attribution, then unlearning restricted to
it); `Guarded` is a line search between the model before and the model after.
"""

# P = elements of a model's vector
from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from clients.unlearners.fisher import RESPONSE, STEP, Masses, Settings, masses, response
from clients.unlearners.steps import num_correct
from fedcl.contracts.fields import MAX_EXAMPLES, Form, TensorField
from fedcl.contracts.requests import ErasureOutcome, ForgetRequest
from fedcl.contracts.unlearner import Local, UnlearnContext, Unlearner, UnlearnView
from fedcl.models.flat import FlatModel, Spec

if TYPE_CHECKING:
    from fedcl.contracts.strategy import LocalWork, Target, Update
    from fedcl.contracts.view import Response, ServerView

CORRECT: Form = {"correct": TensorField((1,), "float64", low=0.0, high=float(MAX_EXAMPLES))}


class Wrapper(Unlearner):
    """Another unlearner, ``base``, in everything that a subclass does not change.

    Steps and metrics of the wrapper's own carry its ``prefix``, so that wrappers can be nested.

    Raises
    ------
    ValueError
        If ``base`` retrains: its models come with the state of a whole run, which cannot be taken in part.
    """

    components: ClassVar[tuple[str, ...]] = ("base",)  # what the configuration's reader builds, too
    prefix: ClassVar[str]

    def __init__(self, *, base: Unlearner) -> None:
        if base.retrains:
            raise ValueError(f"unlearner.base={type(base).__name__}: retrains; it cannot be wrapped")
        self.base = base
        self.scopes = base.scopes  # type: ignore[misc]
        self.observes = base.observes  # type: ignore[misc]
        self.takes_apart = base.takes_apart  # type: ignore[misc]
        # what is done to its edit leaves nothing of what was proven for it
        self.guarantee = "none" if base.guarantee == "none" else "approximate"  # type: ignore[misc]

    def check(self, model: FlatModel) -> None:
        self.base.check(model)

    def bind(self, work: LocalWork) -> None:
        self.base.bind(work)

    def local(self, ctx: UnlearnContext, step: str) -> Local:
        """Do the wrapper's own step, or the base's."""
        own = step.removeprefix(f"{self.prefix}/")
        return self.base.local(ctx, step) if own == step else self.own_step(ctx, own)

    def own_step(self, ctx: UnlearnContext, step: str) -> Local:
        """Do a step of the wrapper itself."""
        return super().local(ctx, step)

    def ask(self, view: UnlearnView, step: str, models: Mapping[str, Tensor], response: Form) -> list[Response]:
        """Ask clients for a step of the wrapper itself."""
        return view.ask(f"{self.prefix}/{step}", models, response)

    def observe(self, updates: Sequence[Update], before: Tensor, view: ServerView) -> None:
        self.base.observe(updates, before, view)

    def metrics(self) -> dict[str, float]:
        """Return the base's metrics, and the wrapper's under its prefix."""
        return self.base.metrics() | {f"{self.prefix}/{name}": value for name, value in self.own_metrics().items()}

    def own_metrics(self) -> dict[str, float]:
        """Return what the wrapper did."""
        return {}

    def forget(self, request: ForgetRequest) -> ErasureOutcome:
        """Let the base forget; wrappers keep nothing about clients."""
        return self.base.forget(request)

    def state_dict(self) -> dict[str, Any]:
        return self.base.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.base.load_state_dict(state)


class Localised(Wrapper):
    """Keep the base's edit in some parameter tensors, and put everything else back.

    The base computes its edit for the whole model. Buffers are always put back.

    Parameters
    ----------
    base
        The unlearner to restrict.
    k
        How many tensors: those with the largest ratio of importance masses, sum of I_F over sum of I_D within the
        tensor, per-sample Fisher over all clients.
    tensors
        Instead a regular expression searched for in tensor names; ``k`` is then not used.

    Raises
    ------
    ValueError
        In :meth:`check`, if ``tensors`` matches nothing.
    """

    prefix = "localised"

    def __init__(self, *, base: Unlearner, k: int = 2, tensors: str | None = None) -> None:
        super().__init__(base=base)
        self.k, self.tensors = k, tensors
        self._share = 0.0

    def check(self, model: FlatModel) -> None:
        """Refuse an expression that matches no parameter tensor."""
        super().check(model)
        if self.tensors is not None:
            self._named(model.spec)

    def own_step(self, ctx: UnlearnContext, step: str) -> Local:
        return response(ctx, Settings()) if step == STEP else super().own_step(ctx, step)

    def unlearn(
        self, requests: Sequence[ForgetRequest], models: Mapping[Target, Tensor], view: UnlearnView
    ) -> dict[Target, Tensor]:
        """Return the base's models in the chosen tensors, and those from before elsewhere."""
        edited: dict[Target, Tensor] = {}
        chosen = {target: self._chosen(model, view) for target, model in models.items()}
        for target, model in self.base.unlearn(requests, models, view).items():
            kept = models[target].clone()
            for name in chosen[target]:
                view.spec.view(kept, name).copy_(view.spec.view(model.to(kept), name))
            edited[target] = kept
        sizes = [sum(view.spec[name].size for name in names) for names in chosen.values()]
        parameters = sum(tensor.size for tensor in view.spec if tensor.kind == "parameter")
        self._share = sum(sizes) / (parameters * max(len(sizes), 1))
        return edited

    def _chosen(self, model: Tensor, view: UnlearnView) -> list[str]:
        if self.tensors is not None:
            return self._named(view.spec)
        found = masses(self.ask(view, STEP, dict.fromkeys([*view.clients, *view.owners], model), RESPONSE))
        return [] if found is None else heaviest(view.spec, found, self.k)

    def _named(self, spec: Spec) -> list[str]:
        names = [tensor.name for tensor in spec if tensor.kind == "parameter"]
        chosen = [name for name in names if re.search(self.tensors or "", name)]
        if not chosen:
            raise ValueError(f"unlearner.tensors={self.tensors!r}: matches none of {', '.join(names)}")
        return chosen

    def own_metrics(self) -> dict[str, float]:
        """Return which share of the parameters the edit was kept in, mean over models."""
        return {"share": self._share}

    def promise(self) -> str:
        which = f"tensors that match {self.tensors!r}" if self.tensors is not None else f"{self.k} tensor(s)"
        return f"{super().promise()}; {type(self.base).__name__}'s edit is kept to {which}, nothing else was changed"


class Guarded(Wrapper):
    """Take so much of the base's edit that clients that stay do not lose more accuracy than allowed.

    The model becomes theta + s (theta_u - theta), in parameters and buffers, with the largest s of 1, 1/2, 1/4, ...
    that keeps the accuracy on the samples that stay within bound, or s = 0: nothing is changed, and that is said.

    Parameters
    ----------
    base
        The unlearner to watch.
    max_retain_drop
        How much accuracy, in [0, 1], the samples that the clients of a model retain may lose.
    halvings
        How often s is halved before the edit is given up.
    """

    prefix = "guard"

    def __init__(self, *, base: Unlearner, max_retain_drop: float = 0.05, halvings: int = 4) -> None:
        super().__init__(base=base)
        self.max_retain_drop, self.halvings = max_retain_drop, halvings
        self._scales: dict[Target, float] = {}
        self._drops: dict[Target, float] = {}

    def own_step(self, ctx: UnlearnContext, step: str) -> Local:
        """Return how many of the client's retained samples the model gets right."""
        if step != "retain_accuracy":
            return super().own_step(ctx, step)
        return Local(
            len(ctx.retain), {"correct": torch.tensor([num_correct(ctx.model, ctx.retain)], dtype=torch.float64)}
        )

    def unlearn(
        self, requests: Sequence[ForgetRequest], models: Mapping[Target, Tensor], view: UnlearnView
    ) -> dict[Target, Tensor]:
        self._scales, self._drops = {}, {}
        users = {
            target: [c for c in view.clients if torch.equal(view.model_of(c), models[target])] for target in models
        }
        return {
            target: self._held(target, models[target], model.to(models[target]), users[target] or view.clients, view)
            for target, model in self.base.unlearn(requests, models, view).items()
        }

    def _held(self, target: Target, before: Tensor, after: Tensor, clients: Sequence[str], view: UnlearnView) -> Tensor:
        """Return the model between ``before`` and ``after`` (P,), measured by ``clients``."""
        first = self._accuracy(before, clients, view)
        tried, scale = after, 1.0
        for halved in range(self.halvings + 1):
            scale = 0.5**halved
            tried = after if halved == 0 else (before.double() + scale * (after.double() - before.double())).float()
            drop = first - self._accuracy(tried, clients, view)
            if drop <= self.max_retain_drop:
                break
        else:
            tried, scale, drop = before, 0.0, 0.0
        self._scales[target], self._drops[target] = scale, drop
        return tried

    def _accuracy(self, model: Tensor, clients: Sequence[str], view: UnlearnView) -> float:
        """Return the accuracy of ``model`` (P,) on what ``clients`` retain; 0 where they have nothing left to lose."""
        responses = self.ask(view, "retain_accuracy", dict.fromkeys(clients, model), CORRECT)
        total = sum(one.num_examples for one in responses)
        return sum(float(one.tensors["correct"]) for one in responses) / total if total else 0.0

    def own_metrics(self) -> dict[str, float]:
        """Return the smallest s and the largest drop over models, and how many models were rolled back."""
        if not self._scales:
            return {}
        return {
            "scale": min(self._scales.values()),
            "retain_drop": max(self._drops.values()),
            "rolled_back": float(sum(scale == 0 for scale in self._scales.values())),
        }

    def promise(self) -> str:
        scales = self._scales.values()
        if not scales:
            return super().promise()
        if not any(scales):
            return f"none: rolled back, because {type(self.base).__name__}'s edit costs more accuracy than allowed"
        if all(scale == 1 for scale in scales):
            return f"{self.base.promise()}; within the allowed loss of accuracy"
        return f"{super().promise()}; {min(scales):g} of the edit was taken, to keep accuracy"


def heaviest(spec: Spec, found: Masses, k: int) -> list[str]:
    """Return the names of the ``k`` parameter tensors with the largest ratio of masses, sum I_F / sum I_D."""
    tensors = [tensor for tensor in spec if tensor.kind == "parameter"]
    slices = [slice(tensor.start, tensor.stop) for tensor in tensors]
    ratio = [float(found.forget[s].sum()) / max(float(found.whole[s].sum()), 1e-300) for s in slices]
    order = sorted(range(len(tensors)), key=lambda place: -ratio[place])
    return [tensors[place].name for place in order[:k] if ratio[place] > 0]
