"""The weighted sum of a round, folded so that the bits do not depend on who computed it where."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fedcl.models.flat import Spec
from fedcl.server.contracts import Fold, Update

# P = parameters, T = tensors
BLOCK = 16  # selected positions a block: fixed before dispatch, so that any worker count folds the same numbers
Term = Callable[[Update], tuple[Tensor, float]]


def fold(
    positions: Sequence[Update | None], term: Term, spec: Spec, sums: Sequence[str] = (), *, block: int = BLOCK
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

    Notes
    -----
    Positions fall into blocks of ``block``; a block is summed in order in float64 and the blocks are added in order.
    A tensor that a task head owns counts only the clients that trained that head.
    """
    total = torch.zeros(spec.size, dtype=torch.float64)
    weights_T = torch.zeros(len(spec), dtype=torch.float64)
    payload: dict[str, Tensor] = {}
    clients: list[str] = []
    for start in range(0, len(positions), block):
        members = [update for update in positions[start : start + block] if update is not None]
        if not members:
            continue
        block_total, block_weights_T, block_payload = fold_block(members, term, spec, sums)
        total += block_total
        weights_T += block_weights_T
        for name, tensor in block_payload.items():
            payload[name] = payload[name] + tensor if name in payload else tensor
        clients += [update.client for update in members]
    sizes = torch.tensor([tensor.size for tensor in spec])
    return Fold(total, weights_T.repeat_interleave(sizes), payload, tuple(clients))


def fold_block(
    members: Sequence[Update], term: Term, spec: Spec, sums: Sequence[str]
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Fold one block: (weighted sum (P,), weights by tensor (T,), sums of uploads), all float64."""
    total = torch.zeros(spec.size, dtype=torch.float64)
    weights_T = torch.zeros(len(spec), dtype=torch.float64)
    payload: dict[str, Tensor] = {}
    for update in members:
        vector, weight = term(update)
        foreign = [tensor for tensor in spec if tensor.task is not None and tensor.task != update.head]
        if foreign:
            # weight decay may have moved a head the client did not train: that is no contribution
            vector = vector.clone()
            for tensor in foreign:
                vector[tensor.start : tensor.stop] = 0.0
        total.add_(vector, alpha=weight)
        weights_T += torch.tensor(
            [weight if tensor.task is None or tensor.task == update.head else 0.0 for tensor in spec],
            dtype=torch.float64,
        )
        for name in sums:
            upload = update.payload[name].double()
            payload[name] = payload[name] + upload if name in payload else upload
    return total, weights_T, payload
