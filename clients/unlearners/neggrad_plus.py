"""NegGrad+: descent on what is retained and ascent on what is forgotten, in the same rounds."""

# P = length of the flat vector
from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from clients.unlearners.averaging import Averaged, add_mean, users_of
from clients.unlearners.steps import cross_entropy, epochs_of, gradients, ignorance, settings
from fedcl.client.sample_gradients import add_to
from fedcl.contracts.fields import MODEL, Form, TensorField
from fedcl.contracts.learner import Batch, LocalTraining
from fedcl.contracts.unlearner import Local, UnlearnContext, UnlearnView

if TYPE_CHECKING:
    from fedcl.contracts.strategy import Target
    from fedcl.contracts.view import Response


@dataclass(kw_only=True, eq=False, repr=False)
class NegGradPlus(Averaged):
    """Plain SGD on alpha CE(R) - (1 - alpha) CE(F), in a federation in which few hold some of F.

    A client steps on the terms it has samples for, and reports the change by each term. The server adds the mean of the
    first parts, weighted by retained samples, and the mean of the second, weighted by forget samples: with one local
    step that is the step on the objective over everybody's samples, also where only a departing client holds F. Layers
    are in evaluation mode.

    Parameters
    ----------
    rounds, epochs
        Rounds, and a client's epochs in each, over what it retains (over the forget set where it retains nothing).
    lr
        Learning rate; None for ``client.optimizer.lr``.
    alpha
        Weight of what is retained, in [0, 1].
    max_norm
        L2 norm to which each step's gradient is clipped; None for any.
    stop_loss
        A client leaves the second term out of each step whose forget batch has a loss above this; None for log C, the
        loss of a uniform guess among the C allowed columns.
    """

    rounds: int = 5
    epochs: int = 1
    lr: float | None = 0.05
    alpha: float = 0.8
    max_norm: float | None = 5.0
    stop_loss: float | None = None

    @property
    def response(self) -> Form:
        """The way of each term, the numbers of samples behind them, and what is counted."""
        number = TensorField((1,), low=0.0)
        counts = TensorField((2,), low=0.0, counts=True)
        return {"retain": MODEL, "forget": MODEL, "counts": counts, "steps": number, "left_out": number}

    def local(self, ctx: UnlearnContext, step: str) -> Local:
        total = len(ctx.retain) + len(ctx.forget)
        if not total:
            return Local(0, {})
        training = settings(ctx, epochs=self.epochs, lr=self.lr)
        ways = {"retain": torch.zeros_like(ctx.model.flat), "forget": torch.zeros_like(ctx.model.flat)}
        steps, left_out = 0, 0
        ctx.model.eval()
        for retain, forget in _pairs(ctx, training):
            terms = self._terms(ctx, retain, forget)
            left_out += forget is not None and "forget" not in terms
            self._clip(terms)
            for name, grads in terms.items():
                shift = torch.zeros_like(ctx.model.flat)
                add_to(shift, ctx.model, torch._foreach_mul(grads, training.lr))
                ctx.model.flat -= shift
                ways[name] -= shift
            steps += 1
        counts = torch.tensor([float(len(ctx.retain)), float(len(ctx.forget))])
        numbers = {"steps": torch.tensor([float(steps)]), "left_out": torch.tensor([float(left_out)])}
        return Local(total, {**ways, "counts": counts, **numbers})

    def asked(self, target: Target, models: Mapping[Target, Tensor], view: UnlearnView) -> Sequence[str]:
        return tuple(dict.fromkeys([*users_of(target, models, view), *view.owners]))

    def added(self, model: Tensor, responses: Sequence[Response]) -> Tensor:
        """Return ``model`` (P,) plus, for each term, the mean way of the clients weighted by the term's samples."""
        change = torch.zeros_like(model, dtype=torch.float64)
        for column, name in enumerate(("retain", "forget")):
            add_mean(change, responses, name, [float(response.tensors["counts"][column]) for response in responses])
        return (model.double() + change).float()

    def _terms(self, ctx: UnlearnContext, retain: Batch | None, forget: Batch | None) -> dict[str, list[Tensor]]:
        """Return the gradients of the terms there are samples for, with their weights in the objective."""
        terms: dict[str, list[Tensor]] = {}
        if retain is not None:
            grads = gradients(ctx.model, cross_entropy(ctx.model, retain))
            torch._foreach_mul_(grads, self.alpha)
            terms["retain"] = grads
        if forget is not None:
            loss = cross_entropy(ctx.model, forget)
            bound = ignorance(forget, ctx.num_columns) if self.stop_loss is None else self.stop_loss
            if float(loss.detach()) <= bound:
                grads = gradients(ctx.model, loss)
                torch._foreach_mul_(grads, -(1 - self.alpha))
                terms["forget"] = grads
        return terms

    def _clip(self, terms: Mapping[str, list[Tensor]]) -> None:
        """Scale all terms alike so that the norm of their sum is at most ``max_norm``."""
        if self.max_norm is None or not terms:
            return
        total = [torch.stack(parts).sum(0) for parts in zip(*terms.values(), strict=True)]
        norm = float(torch.stack([torch.linalg.vector_norm(g.double()) for g in total]).norm())
        if norm > self.max_norm:
            for grads in terms.values():
                torch._foreach_mul_(grads, self.max_norm / norm)


def _pairs(ctx: UnlearnContext, training: LocalTraining) -> Iterator[tuple[Batch | None, Batch | None]]:
    """Yield a batch to retain with one to forget, these over and over; None where the client has none."""
    if not len(ctx.forget):
        yield from ((batch, None) for batch in epochs_of(ctx, ctx.retain, training))
        return
    if not len(ctx.retain):
        yield from ((None, batch) for batch in epochs_of(ctx, ctx.forget, training))
        return
    forget = _forever(ctx, training.batch_size)
    yield from ((batch, next(forget)) for batch in epochs_of(ctx, ctx.retain, training))


def _forever(ctx: UnlearnContext, batch_size: int) -> Iterator[Batch]:
    generator = ctx.rng(f"forget batches {ctx.args.get('round', 0)}")
    while True:
        yield from ctx.forget.batches(batch_size, generator)
