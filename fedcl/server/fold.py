"""The weighted sum of a round, folded so that the bits do not depend on who computed it where."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from fedcl.contracts.strategy import Fold, Update
from fedcl.messages.blocks import BlockSum
from fedcl.models.flat import Spec, TensorSpec

# P = parameters, T = tensors, C = coordinates of a piece
BLOCK = 8  # selected positions a block: fixed before dispatch, so that any worker count folds the same numbers
# Coordinates a piece: three float64 buffers of it stay in a processor's cache. A multiple of any vector register's
# width, so that a coordinate meets the same instruction as in the sum of whole vectors.
PIECE = 1 << 16
Term = Callable[[Update], tuple[Tensor, float]]
Weight = Callable[[Update], float]


@dataclass(frozen=True, slots=True)
class Folded:
    """A client's update that is in the sum of its block already: what is left to know of it.

    ``norm`` is the L2 norm of its change, ``payload_norms`` those of its uploads. It is never late: an update that ages
    comes back by itself.
    """

    client: str
    num_examples: int
    task: int
    metrics: dict[str, float]
    norm: float
    payload_norms: dict[str, float] = field(default_factory=dict)
    age: int = field(default=0, init=False)


Contribution = Update | Folded


class RunningFold:
    """A round's blocks, added up in order while they come in any: those that wait are the ones that came too early.

    ``numbers`` are the blocks that were sent out, ascending.
    """

    def __init__(self, numbers: Iterable[int]) -> None:
        self._awaited = deque(numbers)
        self._early: dict[int, BlockSum] = {}
        self._sum: BlockSum | None = None

    def add(self, block: BlockSum) -> None:
        """Take the sums of a block, and all that have waited for it."""
        self._early[block.number] = block
        while self._awaited and self._awaited[0] in self._early:
            self._take(self._early.pop(self._awaited.popleft()))

    def finish(self, others: Mapping[int, Callable[[], BlockSum]]) -> BlockSum | None:
        """Return the sums of all blocks; ``others`` makes those that came back client by client."""
        for number in sorted({*self._early, *others}):
            self._take(self._early[number] if number in self._early else others[number]())
        return self._sum

    def _take(self, block: BlockSum) -> None:
        if self._sum is None:  # to be added to: what came may be memory that others read
            payload = {name: tensor.clone() for name, tensor in block.payload.items()}
            self._sum = BlockSum(block.number, block.total.clone(), block.weights.clone(), payload)
            return
        self._sum.total.add_(block.total)
        self._sum.weights.add_(block.weights)
        for name, tensor in block.payload.items():
            self._sum.payload[name].add_(tensor)


def fold(
    positions: Sequence[Contribution | None],
    term: Term,
    spec: Spec,
    sums: Sequence[str] = (),
    *,
    block: int = BLOCK,
    weight: Weight | None = None,
    running: RunningFold | None = None,
) -> Fold:
    """Fold the updates of one round.

    Parameters
    ----------
    positions
        One entry for each selected position, in canonical order; None where no update was accepted.
    term
        Gives an update's vector (P,) float64 and its weight.
    sums
        Names of uploads to sum, unweighted.
    weight
        Where the vector is the update's change and nothing else: gives the weight that ``term`` would. The change is
        then made in pieces and never whole. The sums are the same to the bit, several times faster.
    running
        The sums of those blocks that were folded where they were made; their positions are :class:`Folded`.

    Notes
    -----
    Positions fall into blocks of ``block``; a block is summed in order in float64 and the blocks are added in order.
    A tensor that a task head owns counts only the clients that trained that head. Memory beyond the updates' own: two
    vectors (P,) float64, and what ``term`` makes for one update.
    """
    blocks = {
        start // block: [update for update in positions[start : start + block] if isinstance(update, Update)]
        for start in range(0, len(positions), block)
    }
    blocks = {number: members for number, members in blocks.items() if members}
    clients = tuple(update.client for update in positions if update is not None)
    if running is not None:
        whole = running.finish({n: partial(fold_block, n, blocks[n], term, spec, sums, weight=weight) for n in blocks})
    elif blocks:
        whole = _sums(0, list(blocks.values()), term, spec, sums, weight)
    else:
        whole = None
    if whole is None:
        zeros = torch.zeros(spec.size, dtype=torch.float64)
        return Fold(zeros, zeros.clone(), {}, ())
    sizes = torch.tensor([tensor.size for tensor in spec])
    return Fold(whole.total, whole.weights.repeat_interleave(sizes), whole.payload, clients)


def fold_block(
    number: int, members: Sequence[Update], term: Term, spec: Spec, sums: Sequence[str], *, weight: Weight | None
) -> BlockSum:
    """Return the sums of one block, with at least one member, as :func:`fold` forms them: pure, so anywhere."""
    return _sums(number, [members], term, spec, sums, weight)


def _sums(
    number: int,
    blocks: Sequence[Sequence[Update]],
    term: Term,
    spec: Spec,
    sums: Sequence[str],
    weight: Weight | None,
) -> BlockSum:
    if weight is None:
        total, weights_T = _fold_terms(blocks, term, spec)
    else:
        total, weights_T = _fold_changes(blocks, weight, spec)
    return BlockSum(number, total, weights_T, {name: _in_blocks(blocks, name) for name in sums})


def _in_blocks(blocks: Sequence[Sequence[Update]], name: str) -> Tensor:
    """Return the sum of the uploads ``name``, block by block, float64; writes to none of them."""
    sums = [_in_order([update.payload[name].double() for update in members]) for members in blocks]
    return _in_order(sums)


def _in_order(terms: Sequence[Tensor]) -> Tensor:
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return total


def _fold_terms(blocks: Sequence[Sequence[Update]], term: Term, spec: Spec) -> tuple[Tensor, Tensor]:
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
            foreign = _foreign(update, spec)
            if foreign:
                vector = vector.clone()
                for tensor in foreign:
                    vector[tensor.start : tensor.stop] = 0.0
            block_total.add_(vector, alpha=weight)
            weighted[-1].append((update, weight))
        total += block_total
    return total, _sum_weights(weighted, spec)


def _fold_changes(blocks: Sequence[Sequence[Update]], weight: Weight, spec: Spec) -> tuple[Tensor, Tensor]:
    """Return what :func:`_fold_terms` returns for changes, piece by piece."""
    weighted = [[(update, weight(update), _foreign(update, spec)) for update in members] for members in blocks]
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
                for update, alpha, foreign in members:
                    if update.base is not sent:
                        sent = update.base
                        base.copy_(sent[part])
                    change.copy_(update.model[part]).sub_(base)
                    for tensor in foreign:
                        change[max(tensor.start - start, 0) : max(tensor.stop - start, 0)].zero_()
                    block_total.add_(change, alpha=alpha)
                total[part] += block_total
    return total, weights_T


def _foreign(update: Update, spec: Spec) -> list[TensorSpec]:
    """Return the heads the client did not train: weight decay may have moved them, and that is no contribution."""
    return [tensor for tensor in spec if tensor.task is not None and tensor.task != update.head]


def _sum_weights(blocks: Sequence[Sequence[tuple[Update, float]]], spec: Spec) -> Tensor:
    """Return by tensor (T,) the weights of the updates that trained it, summed as their terms are, float64."""
    heads = [tensor.task for tensor in spec]
    sums = dict.fromkeys(heads, 0.0)
    for members in blocks:
        for head in sums:
            sums[head] += sum(weight for update, weight in members if head is None or head == update.head)
    return torch.tensor([sums[head] for head in heads], dtype=torch.float64)
