"""ACU: exact unlearning of a head in closed form, by taking the forget set out of the sums it is solved from.

After "Towards Efficient and Exact Forgetting Services in Pre-Trained-Model-based Continual Learning" (arXiv 2505.12239,
ACU): with features phi of a network that is not trained, a ridge head is a function of sum phi phi^T and sum phi y^T
alone. The paper downdates the inverse; here the sums are downdated and the head is solved again, which is as accurate
and is exactly what the learner (`clients.learners.ranpac`) does when a task ends.
"""

# C = logit columns
from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from clients.learners.closed_form import features_of
from clients.learners.ranpac import GRAM, GRAM_SUMS, gram_sums
from clients.unlearners.averaging import summed
from fedcl.contracts.fields import Form
from fedcl.contracts.requests import ForgetRequest
from fedcl.contracts.unlearner import Local, UnlearnContext, Unlearner, UnlearnView
from fedcl.models.flat import Spec

if TYPE_CHECKING:
    from fedcl.contracts.strategy import Target

Way = Literal["subtract", "rebuild"]
Sums = dict[str, Tensor]
# clients without the samples in question leave all of them out
_RESPONSE: Form = {name: replace(field, counts=False, group="sums") for name, field in GRAM_SUMS.items()}
_HEADS = ("head.", "heads.")
_PROMISES = {
    "initial": "exact for the head, if the network below it has the weights that the run began with",
    "exact": "exact for the head: it is that of a run without the forget set; the network below it has the weights "
    "that the run began with, so no client's data are in it",
    "head": "approximate: the head is solved from what stays, in the present features; the network below it was "
    "trained on clients' data, the forget set among them, and nothing of that is taken back",
    "nothing": "none: no head has been solved yet, and what training made of the forget set is not taken back",
    "partly": "approximate: some clients did not respond, and what they hold is no longer in the head",
}


class ACU(Unlearner):
    """Solve RanPAC's head again without the forget set. Clients that hold some of it are asked once, for sums.

    Parameters
    ----------
    sums
        ``subtract``: clients that hold some of the forget set send its sums, which are subtracted. That is only right
        while the network below the head is the one that the sums were made with: where it was trained, or where an
        owner does not respond, everything is rebuilt. ``rebuild``: the clients that stay always send the sums of what
        they keep.

    Raises
    ------
    ValueError
        When a request is processed, if the learner adds up no Gram matrices.
    """

    takes_apart = (GRAM,)

    def __init__(self, *, sums: Way = "subtract") -> None:
        self.sums = sums
        self._outcome = "initial"
        self._metrics: dict[str, float] = {}

    def local(self, ctx: UnlearnContext, step: str) -> Local:
        """Return the sums of the client's forget set, or of what it retains; no tensor where there is none of it."""
        if step != GRAM:
            return super().local(ctx, step)
        part = ctx.forget if ctx.args["part"] == "forget" else ctx.retain
        sums = gram_sums(features_of(ctx.model, part.x, part.y), ctx.num_columns) if len(part) else {}
        # a client that holds nothing of it has responded all the same
        return Local(len(ctx.forget) + len(ctx.retain), sums)

    def unlearn(
        self, requests: Sequence[ForgetRequest], models: Mapping[Target, Tensor], view: UnlearnView
    ) -> dict[Target, Tensor]:
        if GRAM not in view.statistics.names:
            raise ValueError("unlearner=acu: takes apart the sums of learner=ranpac; choose both or neither")
        before = view.statistics.sums(GRAM)
        self._metrics = {"rebuilt": 0.0}
        if not before:
            self._outcome = "nothing"
            return {}
        fixed = all(same_below_heads(view.spec, model, view.initial) for model in models.values())
        holders = set(view.statistics.consumed(GRAM))
        self._outcome = "exact" if fixed else "head"
        after = self._subtracted(before, models, view) if fixed and self.sums == "subtract" else None
        if after is None:
            after, holders = self._rebuilt(before, view)
        view.statistics.replace(GRAM, after, holders, requests)
        self._metrics["samples"] = float(before["counts"].sum() - after["counts"].sum())
        solved = view.statistics.solve(models)
        lost_C = (before["counts"] > 0) & ~(after["counts"] > 0)
        for vector in solved.values():
            restore_columns(view.spec, vector, view.initial, lost_C)
        return solved

    def _subtracted(self, before: Sums, models: Mapping[Target, Tensor], view: UnlearnView) -> Sums | None:
        """Return the sums without what owners say, or None if one of them does not respond."""
        tasks = view.statistics.consumed(GRAM)
        owners = [client for client in view.owners if client in tasks]
        model = next(iter(models.values()))  # all have the same features
        responses = (
            view.ask(GRAM, dict.fromkeys(owners, model), _RESPONSE, tasks=tasks, part="forget") if owners else []
        )
        out_of_reach = set(tasks) - set(view.clients) - set(owners)
        if out_of_reach or len(responses) < len(owners):
            return None
        removed = summed(responses)
        return {name: value - removed[name] if name in removed else value for name, value in before.items()}

    def _rebuilt(self, before: Sums, view: UnlearnView) -> tuple[Sums, set[str]]:
        """Return the sums of what the clients that stay retain, each in the features of its model, and who they are."""
        tasks = view.statistics.consumed(GRAM)
        stay = [client for client in view.clients if client in tasks]
        asked = {client: view.model_of(client) for client in stay}
        responses = view.ask(GRAM, asked, _RESPONSE, tasks=tasks, part="retain") if stay else []
        if len(responses) < len(stay):
            self._outcome = "partly"
        self._metrics["rebuilt"] = 1.0
        kept = summed(responses)
        return {name: kept.get(name, torch.zeros_like(value)) for name, value in before.items()}, {
            response.client for response in responses
        }

    def promise(self) -> str:
        return _PROMISES[self._outcome]

    def metrics(self) -> dict[str, float]:
        """Return how many samples left the sums, and whether these were made again."""
        return dict(self._metrics)


def same_below_heads(spec: Spec, one: Tensor, other: Tensor) -> bool:
    """Whether two vectors agree, bit for bit, in everything but the heads."""
    return all(
        torch.equal(spec.view(one, tensor.name), spec.view(other, tensor.name))
        for tensor in spec
        if not tensor.name.startswith(_HEADS)
    )


def restore_columns(spec: Spec, vector: Tensor, initial: Tensor, chosen_C: Tensor) -> None:
    """Give the heads' columns ``chosen_C`` (bool) the weights of ``initial``, in place."""
    starts = {"weight": 0, "bias": 0}
    for tensor in spec:
        if tensor.name.startswith(_HEADS):
            kind = tensor.name.rpartition(".")[2]
            rows = chosen_C[starts[kind] : starts[kind] + tensor.shape[0]]
            spec.view(vector, tensor.name)[rows] = spec.view(initial, tensor.name)[rows]
            starts[kind] += tensor.shape[0]
