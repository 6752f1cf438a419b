"""PGD: the client that leaves climbs its own loss, within a ball around a model that it is taken out of."""

# P = length of the flat vector, K = clients that leave
from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from clients.unlearners.averaging import edited_targets, moved, num_parameters
from clients.unlearners.steps import (
    BATCH,
    CHANGE,
    as_trained,
    change_of,
    clip,
    cross_entropy,
    descend,
    epochs_of,
    gradients,
    num_correct,
    project,
    responses_of,
    settings,
    sgd,
)
from fedcl.contracts.requests import ForgetRequest, Scope
from fedcl.contracts.unlearner import Local, UnlearnContext, Unlearner, UnlearnView
from fedcl.models.flat import Spec

if TYPE_CHECKING:
    from fedcl.contracts.strategy import Target


@dataclass(kw_only=True, eq=False, repr=False)
class PGD(Unlearner):
    """Projected gradient ascent from w_ref = (N w - w_i) / (N - 1), in an L2 ball around it.

    Halimi et al., "Federated Unlearning: How to Efficiently Erase a Client in FL?" (arXiv 2207.05521). w is the model
    and w_i what client i makes of it: its last local model is not kept anywhere, so client i trains once more, as
    it did in a round, on all its samples. Of several clients that leave together, all are taken out of the reference,
    each climbs by itself, and their changes are averaged. Rounds without the client, the paper's last step, are
    ``unlearning.recovery_rounds``.

    Parameters
    ----------
    epochs, lr, momentum, batch_size
        Of the ascent; ``epochs`` 0 ends at w_ref. ``batch_size`` None is the client's own.
    max_norm
        L2 norm to which each gradient is clipped; None for any.
    radius
        Of the ball; None for a third of the mean distance of w_ref to ``inits`` random models.
    inits
        How many random models: the run's initial weights, shuffled within each tensor.
    tau
        The ascent stops when the squared distance to w_i is above this; None for never. It depends on the network.
    stop_accuracy
        The ascent stops when the client's accuracy on its own samples (at most 512 of them) is at most this; None for
        never.
    """

    scopes: ClassVar[frozenset[Scope]] = frozenset({"client"})

    epochs: int = 5
    lr: float = 0.01
    momentum: float = 0.9
    batch_size: int | None = None
    max_norm: float | None = 5.0
    radius: float | None = None
    inits: int = 10
    tau: float | None = None
    stop_accuracy: float | None = 0.2

    def __post_init__(self) -> None:
        self._metrics: dict[str, float] = {}

    # -- at the client that leaves ------------------------------------------------------------------------------------

    def local(self, ctx: UnlearnContext, step: str) -> Local:
        """Train once more (``train``), or climb (``ascend``)."""
        if not len(ctx.forget):
            return Local(0, {})
        if step == "train":
            descend(ctx.model, epochs_of(ctx, ctx.forget, ctx.training), as_trained(ctx.model, ctx.training))
            return change_of(ctx, len(ctx.forget))
        return self._ascend(ctx)

    def _ascend(self, ctx: UnlearnContext) -> Local:
        changes = {"epochs": self.epochs, "lr": self.lr, "batch_size": self.batch_size, "momentum": self.momentum}
        training = settings(ctx, **changes, weight_decay=0.0)
        last = ctx.tensors["last"].to(ctx.device)
        watched = ctx.forget.at(torch.randperm(len(ctx.forget), generator=ctx.rng("watched"))[:BATCH].to(ctx.device))
        move, steps, stopped = sgd(ctx.model, training), 0, False
        ctx.model.eval()
        for batch in epochs_of(ctx, ctx.forget, training):
            if self.stop_accuracy is not None and num_correct(ctx.model, watched) / len(watched) <= self.stop_accuracy:
                stopped = True
                break
            grads = gradients(ctx.model, cross_entropy(ctx.model, batch))
            clip(grads, self.max_norm)
            move([torch.neg(grad) for grad in grads])
            project(ctx.model, ctx.received, float(ctx.args["radius"]))
            steps += 1
            head = ctx.model.num_parameters
            if self.tau is not None and float((ctx.model.flat[:head] - last[:head]).double().square().sum()) > self.tau:
                stopped = True
                break
        return change_of(ctx, len(ctx.forget), steps=steps, stopped=stopped)

    # -- at the server ------------------------------------------------------------------------------------------------

    def unlearn(
        self, requests: Sequence[ForgetRequest], models: Mapping[Target, Tensor], view: UnlearnView
    ) -> dict[Target, Tensor]:
        self._metrics = dict.fromkeys(("steps", "stopped", "radius", "reference_distance"), 0.0)
        edited: dict[Target, Tensor] = {}
        for target in edited_targets(requests, models):
            model = models[target]
            trained = view.ask("train", dict.fromkeys(view.owners, model), CHANGE)
            if not trained:
                continue
            last = {
                response.client: (model.double() + response.tensors["change"].double()).float() for response in trained
            }
            start = reference(model, list(last.values()), len(view.clients) + len(last), num_parameters(view.spec))
            radius = self.radius or self._radius(start, view)
            responses = []
            for client, own in last.items():
                responses += view.ask(
                    "ascend", {client: start}, responses_of("steps", "stopped"), {"last": own}, radius=radius
                )
            edited[target] = moved(start, responses)
            for name in ("steps", "stopped"):
                self._metrics[name] += sum(float(response.tensors[name]) for response in responses)
            self._metrics["radius"] = radius
            self._metrics["reference_distance"] = float((start - model).norm())
        return edited

    def metrics(self) -> dict[str, float]:
        """Return steps and early stops in all; the last target's radius, and how far its w_ref was from it."""
        return dict(self._metrics)

    def _radius(self, start: Tensor, view: UnlearnView) -> float:
        generator, head = view.rng("random models"), num_parameters(view.spec)
        far = [start - shuffled(view.initial, view.spec, generator) for _ in range(self.inits)]
        return sum(float(apart[:head].double().norm()) for apart in far) / len(far) / 3


def reference(model: Tensor, last: Sequence[Tensor], num_clients: int, head: int) -> Tensor:
    """Return (N w - sum_i w_i) / (N - K) for the parameters, the first ``head`` of (P,); buffers stay as they are.

    (N w - w_i) / (N - 1) would make a variance negative.

    Raises
    ------
    ValueError
        If all clients leave.
    """
    if num_clients <= len(last):
        raise ValueError(f"{len(last)} of {num_clients} clients leave: some must stay")
    start = model.clone()
    total = num_clients * model[:head].double() - torch.stack([one[:head].double() for one in last]).sum(0)
    start[:head] = (total / (num_clients - len(last))).float()
    return start


def shuffled(initial: Tensor, spec: Spec, generator: torch.Generator) -> Tensor:
    """Return ``initial`` (P,) with the numbers of each tensor in another order: another draw of the same kind."""
    other = initial.clone()
    for tensor in spec:
        order = torch.randperm(tensor.size, generator=generator)
        other[tensor.start : tensor.stop] = initial[tensor.start : tensor.stop][order]
    return other
