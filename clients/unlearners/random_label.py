"""Random labels ("amnesiac"): train on wrong answers for what is to be forgotten, along with what is retained."""

# N = samples, C = logit columns
from __future__ import annotations

from dataclasses import replace

import torch

from clients.unlearners.averaging import Together
from clients.unlearners.steps import allowed, change_of, descend, epochs_of, optimizer, settings
from fedcl.contracts.unlearner import Local, Samples, UnlearnContext


class RandomLabel(Together):
    """Give each sample of F a uniform label other than its own, and train on F and R, shuffled.

    Graves et al., "Amnesiac Machine Learning", AAAI 2021, as in the code that goes with SSD (Foster et al., AAAI 2024).

    The parameters are those of :class:`~clients.unlearners.averaging.Together`; labels are drawn once.
    """

    def local(self, ctx: UnlearnContext, step: str) -> Local:
        parts = [part for part in (relabelled(ctx), ctx.retain) if len(part)]
        if not parts or not (self.everyone or len(ctx.forget)):
            return Local(0, {})
        samples = Samples.join(parts)
        training = settings(ctx, epochs=self.epochs, lr=self.lr, batch_size=self.batch_size)
        steps = descend(ctx.model, epochs_of(ctx, samples, training), optimizer(self.optimizer, ctx.model, training))
        return change_of(ctx, len(samples), steps=steps)


def relabelled(ctx: UnlearnContext) -> Samples:
    """Return the samples to forget with wrong labels; those that may have no other are left out.

    In a request for classes or tasks the labels avoid, where they can, every class that is to be forgotten here.
    """
    if not len(ctx.forget):
        return ctx.forget
    others_NC = allowed(ctx.forget, ctx.num_columns).cpu().clone()
    own_N = ctx.forget.y.cpu()
    others_NC[torch.arange(len(own_N)), own_N] = False
    if all(request.scope in ("class", "task") for request in ctx.requests):
        better_NC = others_NC.clone()
        better_NC[:, sorted(set(own_N.tolist()))] = False
        others_NC = torch.where(better_NC.any(1, keepdim=True), better_NC, others_NC)
    has_N = others_NC.any(1)
    kept = ctx.forget.at(has_N.to(ctx.forget.y.device))
    if not len(kept):
        return kept
    drawn = torch.multinomial(others_NC[has_N].float(), 1, generator=ctx.rng("labels")).squeeze(1)
    return replace(kept, y=drawn.to(kept.y.device))
