"""A corrected update as an update that started now: what every corrector of this folder returns."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from fedcl.contracts.strategy import Update
from fedcl.contracts.view import ServerView
from fedcl.server.strategy import exact_sum


def rebased(update: Update, change: Tensor, view: ServerView) -> Update:
    """Return ``update`` as if its client had started from what it would be sent now, and moved by ``change`` (P,).

    Collaborations that read changes see ``change``; those that read models see a model of now, not an old one.
    """
    base = view.model_of(update.client)
    return replace(update, base=base, model=exact_sum(base, change))
