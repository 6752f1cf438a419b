"""The weighted sum of a round, folded so that the bits do not depend on who computed it where."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fedcl.models.flat import Spec, TensorSpec
from fedcl.server.contracts import Fold, Update

# P = parameters, T = tensors, C = coordinates of a piece
BLOCK = 16  # selected positions a block: fixed before dispatch, so that any worker count folds the same numbers
# Coordinates a piece: three float64 buffers of it stay in a processor's cache. A multiple of any vector register's
# width, so that a coordinate meets the same instruction as in the sum of whole vectors.
PIECE = 1 << 16
Term = Callable[[Update], tuple[Tensor, float]]
Weight = Callable[[Update], float]


def fold(
    positions: Sequence[Update | None],
    term: Term,
    spec: Spec,
    sums: Sequence[str] = (),
    *,
    block: int = BLOCK,
    weight: Weight | None = None,
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

    Notes
    -----
    Positions fall into blocks of ``block``; a block is summed in order in float64 and the blocks are added in order.
    A tensor that a task head owns counts only the clients that trained that head. Memory beyond the updates' own: two
    vectors (P,) float64, and what ``term`` makes for one update.
    """
    starts = range(0, len(positions), block)
    blocks = [[update for update in positions[start : start + block] if update is not None] for start in starts]
    blocks = [members for members in blocks if members]
    if weight is None:
        total, weights_T = _fold_terms(blocks, term, spec)
    else:
        total, weights_T = _fold_changes(blocks, weight, spec)
    sizes = torch.tensor([tensor.size for tensor in spec])
    payload = {name: _in_blocks(blocks, name) for name in sums} if blocks else {}
    clients = tuple(update.client for members in blocks for update in members)
    return Fold(total, weights_T.repeat_interleave(sizes), payload, clients)


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
    weights_T = torch.zeros(len(spec), dtype=torch.float64)
    for members in blocks:
        block_total.zero_()
        block_weights_T = torch.zeros(len(spec), dtype=torch.float64)
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
            block_weights_T += _weights(update, weight, spec)
        total += block_total
        weights_T += block_weights_T
    return total, weights_T


def _fold_changes(blocks: Sequence[Sequence[Update]], weight: Weight, spec: Spec) -> tuple[Tensor, Tensor]:
    """Return what :func:`_fold_terms` returns for changes, piece by piece."""
    weighted = [[(update, weight(update), _foreign(update, spec)) for update in members] for members in blocks]
    weights_T = torch.zeros(len(spec), dtype=torch.float64)
    for members in weighted:
        weights_T += _in_order([_weights(update, alpha, spec) for update, alpha, _ in members])
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


def _weights(update: Update, weight: float, spec: Spec) -> Tensor:
    """Return by tensor (T,) what an update counts, float64."""
    counts = [weight if tensor.task is None or tensor.task == update.head else 0.0 for tensor in spec]
    return torch.tensor(counts, dtype=torch.float64)
