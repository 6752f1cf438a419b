"""The weighted sum of a round's updates. Its bits do not depend on who computed which part of it where.

The selected positions of a round fall into blocks of eight, fixed before dispatch. A block is summed in order in
float64, and the blocks are added in order. Three things follow this rule: :func:`aggregate` at the server,
:meth:`Aggregation.partial_sum` where replies are made, and :class:`PartialSums`, which adds those as they arrive.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial as bound

import torch
from torch import Tensor

from fedcl.contracts.strategy import GLOBAL, Aggregate, Target, Update
from fedcl.messages import Reply, Request, SummedReply
from fedcl.messages.partial_sums import PartialSum
from fedcl.models.flat import Spec
from fedcl.server.validation import Expected, change_norm, payload_norms, rejection

# P = parameters, T = tensors, C = coordinates of a piece
BLOCK = 8  # selected positions a block: fixed before dispatch, so that any number of workers sums the same numbers
# Coordinates a piece: three float64 buffers of it stay in a processor's cache. A multiple of any vector register's
# width, so that a coordinate meets the same instruction as in the sum of whole vectors.
PIECE = 1 << 16
Term = Callable[[Update], tuple[Tensor, float]]
Weight = Callable[[Update], float]


class PartialSums:
    """A round's partial sums, added in the order of their blocks as they arrive; those that are early wait.

    ``blocks`` are the numbers of the blocks that were sent out, ascending.
    """

    def __init__(self, blocks: Iterable[int]) -> None:
        self._awaited = deque(blocks)
        self._early: dict[int, PartialSum] = {}
        self._clients: list[str] = []
        self._sum: PartialSum | None = None

    def add(self, partial: PartialSum) -> None:
        """Take a partial sum, and all that have waited for it."""
        self._early[partial.block] = partial
        while self._awaited and self._awaited[0] in self._early:
            self._take(self._early.pop(self._awaited.popleft()))

    def finish(self, others: Mapping[int, Callable[[], PartialSum]]) -> PartialSum | None:
        """Return the sum over all blocks; ``others`` makes those whose replies arrived one by one."""
        for number in sorted({*self._early, *others}):
            self._take(self._early[number] if number in self._early else others[number]())
        return self._sum and replace(self._sum, clients=tuple(self._clients))

    def _take(self, partial: PartialSum) -> None:
        self._clients += partial.clients
        if self._sum is None:  # copied before anything is added to it: it may be memory that others read
            payload = {name: tensor.clone() for name, tensor in partial.payload.items()}
            self._sum = replace(partial, total=partial.total.clone(), weights=partial.weights.clone(), payload=payload)
            return
        self._sum.total.add_(partial.total)
        self._sum.weights.add_(partial.weights)
        for name, tensor in partial.payload.items():
            self._sum.payload[name].add_(tensor)


def aggregate(
    positions: Sequence[Update | None],
    term: Term,
    spec: Spec,
    sums: Sequence[str] = (),
    *,
    weight: Weight | None = None,
    partial: PartialSums | None = None,
) -> Aggregate:
    """Return the weighted sum of the updates of one round.

    Parameters
    ----------
    positions
        One entry for each selected position, in canonical order; None where no update was accepted, or where it is in
        ``partial``.
    term
        Gives an update's vector (P,) float64 and its weight.
    sums
        Names of uploads to sum, unweighted.
    weight
        Where the vector is the update's change and nothing else: gives the weight that ``term`` would. The change is
        then made in pieces and never whole. The sums are the same to the bit, several times faster.
    partial
        The sums of those blocks that were summed where they were made.

    Notes
    -----
    A tensor that a task head owns counts only the clients that trained that head. Memory beyond the updates' own: two
    vectors (P,) float64, and what ``term`` makes for one update.
    """
    blocks = {
        start // BLOCK: [update for update in positions[start : start + BLOCK] if update is not None]
        for start in range(0, len(positions), BLOCK)
    }
    blocks = {number: members for number, members in blocks.items() if members}
    if partial is not None:
        whole = partial.finish({n: bound(_summed, n, [own], term, spec, sums, weight) for n, own in blocks.items()})
    else:
        whole = _summed(0, list(blocks.values()), term, spec, sums, weight) if blocks else None
    if whole is None:
        zeros = torch.zeros(spec.size, dtype=torch.float64)
        return Aggregate(zeros, zeros.clone(), {}, ())
    sizes = torch.tensor([tensor.size for tensor in spec])
    return Aggregate(whole.total, whole.weights.repeat_interleave(sizes), whole.payload, whole.clients)


@dataclass(frozen=True)
class Aggregation:
    """How a strategy sums updates: all it takes to form a partial sum, and nothing that a round changes.

    ``term`` and ``weight`` are those of :func:`aggregate`, ``sums`` the uploads to add up, ``expected`` what every
    reply must be, ``max_norm`` the largest L2 norm of a change that is accepted.
    """

    spec: Spec
    term: Term
    weight: Weight | None
    sums: tuple[str, ...]
    expected: Expected
    max_norm: float | None = None

    def partial_sum(
        self, block: int, requests: Sequence[Request], replies: Sequence[Reply | Exception]
    ) -> tuple[PartialSum, dict[str, Reply]] | None:
        """Return a block's sum and, by client, the replies that are in it; None if none is.

        A reply that cannot be accepted is left as it is, for the server to say why.
        """
        updates, summed = [], {}
        for request, reply in zip(requests, replies, strict=True):
            base = request.model
            if isinstance(reply, Exception) or base is None or request.task is None or not reply.num_examples:
                continue
            if rejection(reply, self.expected, base=base, max_norm=self.max_norm) is None:
                reply = _on_cpu(reply)
                update = update_of(request, reply, base)
                updates.append(update)
                norms = change_norm(update.model, base), reply.num_bytes, payload_norms(reply.payload)
                summed[request.client] = Reply(reply.num_examples, reply.metrics, summed=SummedReply(*norms))
        if not updates:
            return None
        return _summed(block, [updates], self.term, self.spec, self.sums, self.weight), summed


def _on_cpu(reply: Reply) -> Reply:
    """Return a reply as the server would see it, also when it was trained on a GPU."""
    model = None if reply.model is None else reply.model.detach().cpu()
    return replace(reply, model=model, payload={name: t.detach().cpu() for name, t in reply.payload.items()})


def update_of(
    request: Request,
    reply: Reply,
    base: Tensor,
    *,
    model: Tensor | None = None,
    target: Target = GLOBAL,
    age: int = 0,
) -> Update:
    """Return the update of a sound reply to a train request; ``model`` (P,) replaces the one in the reply."""
    trained, task = reply.model if model is None else model, request.task
    assert trained is not None  # every sound reply to a train message has a model
    assert task is not None
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


def _summed(
    number: int,
    blocks: Sequence[Sequence[Update]],
    term: Term,
    spec: Spec,
    sums: Sequence[str],
    weight: Weight | None,
) -> PartialSum:
    """Return the sum over ``blocks``, each with at least one update: pure, so that it can run anywhere."""
    total, weights_T = _sum_terms(blocks, term, spec) if weight is None else _sum_changes(blocks, weight, spec)
    clients = tuple(update.client for members in blocks for update in members)
    return PartialSum(number, clients, total, weights_T, {name: _sum_uploads(blocks, name) for name in sums})


def _sum_uploads(blocks: Sequence[Sequence[Update]], name: str) -> Tensor:
    """Return the sum of the uploads ``name``, block by block, float64; writes to none of them."""
    return _in_order([_in_order([update.payload[name].double() for update in members]) for members in blocks])


def _in_order(terms: Sequence[Tensor]) -> Tensor:
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return total


def _sum_terms(blocks: Sequence[Sequence[Update]], term: Term, spec: Spec) -> tuple[Tensor, Tensor]:
    """Return the weighted sum (P,) and the weights by tensor (T,), float64, of any term."""
    total = torch.zeros(spec.size, dtype=torch.float64)
    block_total = torch.empty(spec.size, dtype=torch.float64)
    weighted: list[list[tuple[Update, float]]] = []
    for members in blocks:
        block_total.zero_()
        weighted.append([])
        for update in members:
            kept = "delta" in update.__dict__
            vector, weight = term(update)
            if not kept:
                # Kept with every update, the changes would be K vectors of float64.
                update.__dict__.pop("delta", None)
            heads = update.other_heads(spec)
            if heads:
                vector = vector.clone()
                for tensor in heads:
                    vector[tensor.start : tensor.stop] = 0.0
            block_total.add_(vector, alpha=weight)
            weighted[-1].append((update, weight))
        total += block_total
    return total, _sum_weights(weighted, spec)


def _sum_changes(blocks: Sequence[Sequence[Update]], weight: Weight, spec: Spec) -> tuple[Tensor, Tensor]:
    """Return what :func:`_sum_terms` returns for changes, piece by piece."""
    weighted = [[(update, weight(update), update.other_heads(spec)) for update in members] for members in blocks]
    weights_T = _sum_weights([[(update, alpha) for update, alpha, _ in members] for members in weighted], spec)
    total = torch.zeros(spec.size, dtype=torch.float64)
    with torch.inference_mode():  # a third less of what a call costs besides its arithmetic
        change_C, base_C, block_C = (torch.empty(PIECE, dtype=torch.float64) for _ in range(3))
        for start in range(0, spec.size, PIECE):
            part = slice(start, min(start + PIECE, spec.size))
            size = part.stop - part.start
            change, base, block_total, sent = change_C[:size], base_C[:size], block_C[:size], None
            for members in weighted:
                block_total.zero_()
                for update, alpha, heads in members:
                    if update.base is not sent:
                        sent = update.base
                        base.copy_(sent[part])
                    change.copy_(update.model[part]).sub_(base)
                    for tensor in heads:
                        change[max(tensor.start - start, 0) : max(tensor.stop - start, 0)].zero_()
                    block_total.add_(change, alpha=alpha)
                total[part] += block_total
    return total, weights_T


def _sum_weights(blocks: Sequence[Sequence[tuple[Update, float]]], spec: Spec) -> Tensor:
    """Return by tensor (T,) the weights of the updates that trained it, summed as their terms are, float64."""
    heads = [tensor.task for tensor in spec]
    sums = dict.fromkeys(heads, 0.0)
    for members in blocks:
        for head in sums:
            sums[head] += sum(weight for update, weight in members if head is None or head == update.head)
    return torch.tensor([sums[head] for head in heads], dtype=torch.float64)
