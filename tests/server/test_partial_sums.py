"""Replies that are summed where they are made: the same bits as if each had come back by itself."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial as bound
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import ConfigRecord

from fedcl.assembly import load_dataset, make_aggregation, make_model, make_stream
from fedcl.base.randomness import torch_generator
from fedcl.config.compose import compose
from fedcl.contracts.fields import TensorField
from fedcl.contracts.strategy import GLOBAL, Update
from fedcl.messages import VISIT, Reply, Request, visit_record
from fedcl.messages.partial_sums import PartialSum, is_partial_sum, partial_sum_content, read_partial_sum
from fedcl.models.flat import Spec, TensorSpec
from fedcl.scenario.task import Task
from fedcl.server.aggregation import BLOCK, Aggregation, PartialSums, aggregate
from fedcl.server.cohorts import COHORT
from fedcl.server.loop import Server
from fedcl.server.validation import Expected
from fedcl.simulation.jobs import Job, without

SPEC = Spec([TensorSpec("body", (3,), 0, 3, "parameter", None), TensorSpec("head", (1,), 3, 4, "parameter", 1)])
TASK = Task(id=1, classes=(0, 1), columns=(0, 1), head=1)
BASE = torch.tensor([1.0, 2.0, 3.0, 4.0])
EXPECTED = Expected.of("train", SPEC, {"s": TensorField((4,))})
AGGREGATION = Aggregation(SPEC, lambda u: (u.delta, u.weight), lambda u: u.weight, ("s",), EXPECTED, max_norm=100.0)


def request(client: str, block: int = 0) -> Request:
    return Request("train", client, 0, -1, 5, 5, TASK, model=BASE, block=block)


def metrics(loss: float) -> dict[str, float]:
    return {"loss": loss, "loss_first": 0.5, "steps": 1.0, "samples_trained": 4.0}


def reply(change: float, num_examples: int, upload: float = 0.0) -> Reply:
    return Reply(num_examples, metrics(change), BASE + change, {"s": torch.full((4,), upload)})


def test_a_block_by_hand() -> None:
    asked = [request(client) for client in "abcdef"]
    responses: list[Reply | Exception] = [
        reply(1.0, 2, 10.0),
        ValueError("out of memory, say"),
        reply(2.0, 6, 20.0),
        reply(math.nan, 3),
        reply(1.0, 0),
        reply(90.0, 3),  # a change of norm 180
    ]
    found = AGGREGATION.partial_sum(7, asked, responses)
    assert found is not None
    sums, left = found
    assert (sums.block, sums.clients, list(left)) == (7, ("a", "c"), ["a", "c"])
    assert sums.total.tolist() == [14.0] * 4  # 2 * 1 + 6 * 2
    assert sums.weights.tolist() == [8.0, 8.0]
    assert sums.payload["s"].tolist() == [30.0] * 4
    assert left["a"].summed is not None
    assert left["a"].summed.norm == 2.0
    assert left["a"].summed.payload_norms == {"s": 20.0}
    assert (left["a"].num_examples, left["a"].metrics, left["a"].model) == (2, metrics(1.0), None)
    assert left["a"].num_bytes == 32  # of the model and the upload that it stands for


def test_a_block_of_which_nothing_counts_is_none() -> None:
    assert AGGREGATION.partial_sum(0, [request("a")], [ValueError("no")]) is None


def test_a_block_travels_as_it_is() -> None:
    found = AGGREGATION.partial_sum(3, [request(c) for c in "ab"], [reply(0.1, 1), reply(0.2, 2)])
    assert found is not None
    found[1]["b"].metrics = {"accuracy": 0.5}  # a client may have nothing to test itself on, or nothing else
    content = partial_sum_content(*found)
    assert is_partial_sum(content)
    sums, replies = read_partial_sum(content)
    assert replies == found[1]
    for name in ("total", "weights"):
        assert torch.equal(getattr(sums, name), getattr(found[0], name))
    assert torch.equal(sums.payload["s"], found[0].payload["s"])


def updates(count: int) -> list[Update | None]:
    generator = torch_generator(0, "folding")
    made: list[Update | None] = []
    for i in range(count):
        scale = 10.0 ** float(3 * torch.randn(1, generator=generator))
        model = BASE + scale * torch.randn(4, generator=generator)
        upload = {"s": torch.randn(4, generator=generator)}
        made.append(Update(str(i), 0, GLOBAL, 0, BASE, model, i + 1, i + 0.3, 1, i % 2, payload=upload))
    made[BLOCK] = None
    return made


def block_of(positions: list[Update | None], number: int) -> PartialSum:
    members = positions[number * BLOCK : (number + 1) * BLOCK]
    alone = aggregate(members, AGGREGATION.term, SPEC, ("s",), weight=AGGREGATION.weight)
    weights_T = alone.weight[[tensor.start for tensor in SPEC]]
    return PartialSum(number, alone.clients, alone.total, weights_T, alone.payload)


@pytest.mark.parametrize("by_itself", [(), (0,), (2,), (1, 3)])
def test_whichever_blocks_come_in_whichever_order_the_sum_has_the_same_bits(by_itself: tuple[int, ...]) -> None:
    positions = updates(3 * BLOCK + 3)
    whole = aggregate(positions, AGGREGATION.term, SPEC, ("s",), weight=AGGREGATION.weight)
    there = [number for number in range(4) if number not in by_itself]
    for order in itertools.permutations(there):
        partial = PartialSums(range(4))
        for number in order:
            partial.add(block_of(positions, number))
        mixed = [u if i // BLOCK in by_itself else None for i, u in enumerate(positions)]
        again = aggregate(mixed, AGGREGATION.term, SPEC, ("s",), weight=AGGREGATION.weight, partial=partial)
        assert torch.equal(again.total, whole.total)
        assert torch.equal(again.weight, whole.weight)
        assert torch.equal(again.payload["s"], whole.payload["s"])
        assert again.clients == whole.clients


def test_a_round_of_which_nothing_came_sums_to_nothing() -> None:
    again = aggregate(
        [None, None], AGGREGATION.term, SPEC, ("s",), weight=AGGREGATION.weight, partial=PartialSums(range(1))
    )
    assert again.clients == ()
    assert not again.total.any()


def blocks_of(content: Any) -> list[int]:
    visit = content[VISIT]
    assert isinstance(visit, ConfigRecord)
    return list(visit.get("blocks", []))  # type: ignore[arg-type]


def job(blocks: list[int]) -> Job:
    visit = visit_record([request(str(i), block) for i, block in enumerate(blocks)])
    return Job("1", {VISIT: visit}, [str(i) for i in range(len(blocks))], [-1] * len(blocks), 10)


def test_calls_are_cut_between_blocks() -> None:
    # clients of blocks 0 and 2 whose devices dropped out are not in the message
    parts = job([0] * 6 + [1] * 8 + [2] * 3 + [3] * 5).split(8)
    assert [blocks_of(part.wire) for part in parts] == [[0] * 6, [1] * 8, [2] * 3 + [3] * 5]


def test_a_block_of_which_a_part_is_left_is_none() -> None:
    whole = job([0, 0, 1, 1])
    assert [blocks_of(part.wire) for part in whole.split(1)] == [[-1]] * 4
    assert whole.cancel({"1"})
    assert blocks_of(whole.wire) == [-1, 1, 1]
    left = without(job([0, 0, 1, 1]).wire, {"2"})  # type: ignore[arg-type]
    assert blocks_of(left) == [0, 0, -1]


DROPS = ["num_clients=150", "rounds_per_task=1", "devices=homogeneous", "devices.dropout=0.2"]


@pytest.mark.parametrize(
    "overrides",
    [
        ["num_clients=19", "clients_per_round=18"],
        ["num_clients=19", "strategy/collaboration=scaffold", "learner=finetune"],
        ["num_clients=19", "max_update_norm=0.5", "client.optimizer.lr=0.2"],
        DROPS,
    ],
    ids=["fedavg", "scaffold", "rejected", "lost"],
)
def test_a_run_has_the_same_bits(
    overrides: list[str],
    run_experiment: Callable[..., Path],
    metrics_hash: Callable[[Path], str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    taken: list[int] = []
    add = PartialSums.add

    def noting(self: PartialSums, partial: PartialSum) -> None:
        taken.append(partial.block)
        add(self, partial)

    monkeypatch.setattr(PartialSums, "add", noting)
    settings = ["rounds_per_task=2", "scenario.num_tasks=2", *overrides]
    where_made = metrics_hash(run_experiment("where-made", *settings))
    assert taken
    if overrides is DROPS:
        assert max(taken) == 150 // BLOCK  # more than one message: they end with a block
        assert COHORT < 150
    taken.clear()
    monkeypatch.setattr(Server, "_sums_suffice", lambda self: False)
    assert metrics_hash(run_experiment("here", *settings)) == where_made
    assert not taken


def test_a_staleness_part_that_looks_at_updates_sees_them(run_experiment: Callable[..., Path]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PartialSums, "add", bound(pytest.fail, "nothing may be summed elsewhere"))
        run_experiment("seen", "num_clients=9", "rounds_per_task=1", "strategy/staleness=dc_asgd")


def test_requests_keep_their_block_on_the_way() -> None:
    from fedcl.messages import instruction, requests

    asked = [replace(request("a", 4), model=None), replace(request("b", -1), model=None)]
    assert [one.block for one in requests(instruction(asked, None, None))] == [4, -1]


@pytest.mark.parametrize("name", ["fedavg", "fedprox", "fedper", "fedrep", "ditto", "apfl", "pfedme", "scaffold"])
def test_what_needs_a_sum_and_no_more_is_summed_where_it_is_made(name: str) -> None:
    assert _summable(name)


@pytest.mark.parametrize("name", ["median", "krum", "fedcac", "fedamp", "ifca", "local", "fedat"])
def test_what_needs_each_reply_is_not(name: str) -> None:
    assert not _summable(name)


def _summable(collaboration: str) -> bool:
    cfg = compose([f"strategy/collaboration={collaboration}", "strategy/projection=none"])
    dataset = load_dataset(cfg)
    model = make_model(cfg, dataset, make_stream(cfg, dataset), torch.device("cpu"))
    return make_aggregation(cfg, model, dataset) is not None
