from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fedcl.base.randomness import torch_generator
from fedcl.contracts.strategy import GLOBAL, Update
from fedcl.models.flat import Spec, TensorSpec
from fedcl.server.aggregation import BLOCK, PIECE, aggregate

# a body of 2 elements, two heads of 1 element each
SPEC = Spec(
    [
        TensorSpec("body", (2,), 0, 2, "parameter", None),
        TensorSpec("heads.0.weight", (1,), 2, 3, "parameter", 0),
        TensorSpec("heads.1.weight", (1,), 3, 4, "parameter", 1),
    ]
)


def update(client: int, delta: list[float], weight: float, head: int = 0, **payload: Tensor) -> Update:
    base = torch.zeros(len(delta))
    model = torch.tensor(delta)
    return Update(
        client=str(client),
        visit=0,
        target=GLOBAL,
        base_version=0,
        base=base,
        model=model,
        num_examples=int(max(weight, 1)),
        weight=weight,
        task=head,
        head=head,
        payload=payload,
    )


def term(update: Update) -> tuple[Tensor, float]:
    return update.delta, update.weight


def test_hand_numbers() -> None:
    summed = aggregate([update(0, [1, 2, 3, 0], 1), None, update(2, [4, 8, -1, 0], 3)], term, SPEC)
    assert summed.total.tolist() == [13, 26, 0, 0]
    assert summed.weight.tolist() == [4, 4, 4, 0]
    assert summed.mean().tolist() == [3.25, 6.5, 0, 0]
    assert summed.clients == ("0", "2")
    assert summed.total.dtype == summed.weight.dtype == torch.float64


def test_a_head_counts_only_clients_that_trained_it() -> None:
    # client 1 trained head 1; weight decay moved its head 0 all the same
    summed = aggregate([update(0, [1, 1, 6, 0], 1, head=0), update(1, [1, 1, -5, 8], 3, head=1)], term, SPEC)
    assert summed.mean().tolist() == [1, 1, 6, 8]
    assert summed.weight.tolist() == [4, 4, 1, 3]


def test_a_head_nobody_trained_stays() -> None:
    assert aggregate([update(0, [1, 1, 5, 9], 2, head=0)], term, SPEC).mean()[3] == 0


def test_uploads_are_summed_without_weights() -> None:
    summed = aggregate(
        [update(0, [0] * 4, 5, s=torch.tensor([1.0])), update(1, [0] * 4, 7, s=torch.tensor([2.5]))], term, SPEC, ["s"]
    )
    assert summed.payload["s"].tolist() == [3.5]
    assert summed.payload["s"].dtype == torch.float64


def test_the_upload_of_one_client_is_not_written_to() -> None:
    first = torch.tensor([1.0], dtype=torch.float64)
    aggregate([update(0, [0] * 4, 1, s=first), update(1, [0] * 4, 1, s=first.clone())], term, SPEC, ["s"])
    assert first.item() == 1.0


def test_nobody_came() -> None:
    summed = aggregate([None, None], term, SPEC, ["s"])
    assert summed.mean().tolist() == [0, 0, 0, 0]
    assert summed.clients == ()
    assert summed.payload == {}


def random_updates(count: int) -> list[Update | None]:
    generator = torch_generator(0, "updates")
    rows = torch.randn(count, 4, generator=generator) * 10 ** torch.randn(count, 1, generator=generator).mul(3)
    return [update(i, row.tolist(), float(i + 1), head=i % 2) for i, row in enumerate(rows)]


def test_blocks_are_summed_alone_and_added_in_order() -> None:
    positions = random_updates(3 * BLOCK + 5)
    positions[3] = positions[BLOCK] = None
    whole = aggregate(positions, term, SPEC)
    total = torch.zeros(4, dtype=torch.float64)
    weight = torch.zeros(4, dtype=torch.float64)
    for start in range(0, len(positions), BLOCK):  # as workers would: each block by itself
        part = aggregate(positions[start : start + BLOCK], term, SPEC)
        total += part.total
        weight += part.weight
    assert torch.equal(whole.total, total)
    assert torch.equal(whole.weight, weight)


def test_a_missing_update_does_not_move_others_between_blocks() -> None:
    positions = random_updates(BLOCK + 1)
    without = [None, *positions[1:]]
    alone = aggregate([positions[BLOCK]], term, SPEC)
    first = aggregate(without[:BLOCK], term, SPEC)
    assert torch.equal(aggregate(without, term, SPEC).total, first.total + alone.total)


def test_the_sum_is_exact_up_to_float64_rounding() -> None:
    positions = random_updates(40)
    exact = sum((term(u)[0] * term(u)[1] for u in positions if u is not None), torch.zeros(4, dtype=torch.float64))
    summed = aggregate(positions, term, SPEC)
    torch.testing.assert_close(summed.total[:2], exact[:2], rtol=1e-12, atol=1e-9)


def test_equal_models_give_no_change() -> None:
    same = random_updates(1)[0]
    assert same is not None
    positions = [
        Update(str(i), 0, GLOBAL, 0, same.model, same.model.clone(), i + 1, float(i + 1), 0, 0) for i in range(37)
    ]
    assert not aggregate(positions, term, SPEC).mean().any()


def test_equal_changes_give_that_change() -> None:
    delta = [0.1, 1e-30, 3e30, 0.0]
    positions = [update(i, delta, float(2 ** (i % 3))) for i in range(37)]
    mean = aggregate(positions, term, SPEC).mean()
    assert torch.equal(mean.float(), torch.tensor(delta))


@pytest.mark.parametrize("size", [1, 15, 1000, PIECE - 1, PIECE, PIECE + 13, 3 * PIECE + 5])
@pytest.mark.parametrize("shared_base", [True, False])
def test_changes_in_pieces_are_the_whole_changes_to_the_bit(size: int, shared_base: bool) -> None:
    generator = torch_generator(0, "pieces")
    cuts = [0, size // 3, size // 2, size]
    spec = Spec(
        [TensorSpec(f"t{i}", (cuts[i + 1] - cuts[i],), cuts[i], cuts[i + 1], "parameter", (None, 0, 1)[i])
         for i in range(3)]
    )  # fmt: skip
    base = torch.randn(size, generator=generator)
    positions: list[Update | None] = []
    for i in range(2 * BLOCK + 3):
        sent = base if shared_base else torch.randn(size, generator=generator)
        model = sent + torch.randn(size, generator=generator) * 10.0 ** (i % 5 - 2)
        positions.append(Update(str(i), 0, GLOBAL, 0, sent, model, 1, 0.1 + i / 3, i % 2, i % 2))
    positions[5] = None
    whole = aggregate(positions, term, spec)
    pieces = aggregate(positions, term, spec, weight=lambda update: update.weight)
    assert torch.equal(whole.total.view(torch.int64), pieces.total.view(torch.int64))
    assert torch.equal(whole.weight, pieces.weight)
    assert whole.clients == pieces.clients
    pieces.total.add_(1.0)  # an ordinary tensor, not one of inference mode
    # The sum as it is defined, one update after the other.
    total = torch.zeros(size, dtype=torch.float64)
    for start in range(0, len(positions), BLOCK):
        block_total = torch.zeros(size, dtype=torch.float64)
        for update in positions[start : start + BLOCK]:
            if update is not None:
                change = update.model.double() - update.base.double()
                foreign = spec[f"t{2 - update.head}"]
                change[foreign.start : foreign.stop] = 0.0
                block_total.add_(change, alpha=update.weight)
        total += block_total
    assert torch.equal(whole.total, total)


def test_aggregating_keeps_no_change_alive() -> None:
    updates = random_updates(3)
    assert updates[0] is not None
    before = updates[0].delta
    aggregate(updates, term, SPEC)
    assert ["delta" in u.__dict__ for u in updates if u is not None] == [True, False, False]
    assert updates[0].delta is before
