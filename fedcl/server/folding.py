"""Folding where replies are made: validated, judged and summed there, so that a block of clients sends one vector."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from fedcl.contracts.strategy import GLOBAL, Target, Update
from fedcl.messages import InBlock, Reply, Request
from fedcl.messages.blocks import BlockSum
from fedcl.models.flat import Spec
from fedcl.scenario.task import Task
from fedcl.server.fold import Term, Weight, fold_block
from fedcl.server.validation import Expected, change_norm, payload_norms, rejection


@dataclass(frozen=True)
class Folding:
    """What a strategy's sum is made of: all that it takes to form a block's, and nothing that a round changes.

    ``term`` and ``weight`` are those of :func:`~fedcl.server.fold.fold`, ``sums`` the uploads to add up, ``expected``
    what every reply must be, ``max_norm`` the largest change that counts.
    """

    spec: Spec
    term: Term
    weight: Weight | None
    sums: tuple[str, ...]
    expected: Expected
    max_norm: float | None = None

    def block(
        self, number: int, requests: Sequence[Request], replies: Sequence[Reply | Exception]
    ) -> tuple[BlockSum, dict[str, Reply]] | None:
        """Return the block's sums, and by client what is left of the replies in them; None if none counts.

        A reply that must not count is left as it is, for the server to say why.
        """
        updates, left = [], {}
        for request, reply in zip(requests, replies, strict=True):
            base = request.model
            if isinstance(reply, Exception) or base is None or request.task is None or not reply.num_examples:
                continue
            if rejection(reply, self.expected, base=base, max_norm=self.max_norm) is None:
                reply = _at_server(reply)
                update = update_of(request, reply, request.task, base)
                updates.append(update)
                folded = InBlock(change_norm(update.model, base), reply.num_bytes, payload_norms(reply.payload))
                left[request.client] = Reply(reply.num_examples, reply.metrics, folded=folded)
        if not updates:
            return None
        return fold_block(number, updates, self.term, self.spec, self.sums, weight=self.weight), left


def _at_server(reply: Reply) -> Reply:
    """Return a reply as the server would see it: what was trained on a GPU has left it."""
    model = None if reply.model is None else reply.model.detach().cpu()
    return replace(reply, model=model, payload={name: t.detach().cpu() for name, t in reply.payload.items()})


def update_of(
    request: Request,
    reply: Reply,
    task: Task,
    base: Tensor,
    *,
    model: Tensor | None = None,
    target: Target = GLOBAL,
    age: int = 0,
) -> Update:
    """Return the update that a sound reply makes; ``model`` (P,) in place of the one that came back."""
    trained = reply.model if model is None else model
    assert trained is not None  # a sound reply to a train message has one
    return Update(
        client=request.client,
        visit=request.visit,
        target=target,
        base_version=request.version,
        base=base,
        model=trained,
        num_examples=reply.num_examples,
        weight=float(reply.num_examples),
        task=task.id,
        head=task.head,
        age=age,
        payload=reply.payload,
        metrics=reply.metrics,
    )
