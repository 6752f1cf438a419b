"""Samples that an unlearner is given: batches, joins, and how a client's are parted."""

from __future__ import annotations

import numpy as np
import torch

from fedcl.client.forgetting import part
from fedcl.client.local_data import PartitionedData
from fedcl.contracts.requests import ForgetInstruction, ForgetRequest
from fedcl.contracts.unlearner import Samples
from fedcl.data.dataset import ArrayDataset, Dataset, Partition
from fedcl.scenario.task import Task

CPU = torch.device("cpu")


def drawn(count: int, *, masked: bool = False) -> Samples:
    y = torch.arange(count) % 3
    mask = torch.ones(count, 3, dtype=torch.bool) if masked else None
    return Samples(torch.arange(2.0 * count).reshape(count, 2), y, mask)


def test_batches_in_order_are_views_of_all_samples() -> None:
    samples = drawn(7, masked=True)
    batches = list(samples.batches(3))
    assert [len(batch.y) for batch in batches] == [3, 3, 1]
    assert torch.equal(torch.cat([batch.x for batch in batches]), samples.x)
    assert batches[1].x.data_ptr() == samples.x[3:].data_ptr()
    assert batches[2].mask is not None
    assert batches[2].mask.shape == (1, 3)


def test_batches_in_a_drawn_order_have_each_sample_once() -> None:
    samples = drawn(7)
    batches = list(samples.batches(3, torch.Generator().manual_seed(1)))
    seen = torch.cat([batch.x for batch in batches])
    assert not torch.equal(seen, samples.x)
    assert torch.equal(seen[seen[:, 0].argsort()], samples.x)
    assert all(torch.equal(batch.y, (batch.x[:, 0] / 2).long() % 3) for batch in batches)


def test_no_samples_are_no_batches() -> None:
    assert list(drawn(0).batches(3)) == list(drawn(0).batches(3, torch.Generator())) == []


def test_a_join_allows_every_column_where_nothing_was_said() -> None:
    one = drawn(2)
    assert Samples.join([one]) is one
    both = Samples.join([one, drawn(3, masked=True)])
    assert len(both) == 5
    assert both.mask is not None
    assert bool(both.mask.all())


def test_only_what_is_asked_for_is_parted() -> None:
    y = np.array([0, 1, 0, 1, 1, 0])
    half = ArrayDataset(np.arange(6, dtype=np.float32)[:, None], y)
    dataset = Dataset(half, half, ("a", "b"))
    halves = (np.array([0, 1, 2]), np.array([3, 4]))
    data = PartitionedData(dataset, Partition(halves, halves), ("0", "1"))
    task = Task(0, (0, 1), (0, 1))
    note = ForgetInstruction((ForgetRequest("a", "class", classes=(0,)),), (task,))
    [(_, gone, kept)] = part(data, "0", note, CPU)
    assert (gone.x[:, 0].tolist(), kept.x[:, 0].tolist()) == ([0.0, 2.0], [1.0])
    [(_, gone, kept)] = part(data, "1", note, CPU)
    assert (gone.x[:, 0].tolist(), kept.x[:, 0].tolist()) == ([], [3.0, 4.0])
    leaving = ForgetInstruction((ForgetRequest("b", "client", clients=("1",)),), (task,))
    [(_, gone, kept)] = part(data, "1", leaving, CPU)
    assert (gone.x[:, 0].tolist(), kept.x[:, 0].tolist()) == ([3.0, 4.0], [])
    [(_, gone, kept)] = part(data, "0", leaving, CPU)
    assert (len(gone), kept.x[:, 0].tolist()) == (0, [0.0, 1.0, 2.0])
    assert kept is data.train("0", task, CPU)  # not copied
