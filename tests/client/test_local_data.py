from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from fedcl.client.local_data import PartitionedData
from fedcl.data.dataset import ArrayDataset, Dataset, Partition
from fedcl.scenario.task import Task

# Train samples k = 0..9 with value 10 k and label k mod 3; test samples the same, negative.
Y = np.arange(10, dtype=np.int64) % 3
SOURCE = Dataset(
    train=ArrayDataset(np.arange(0, 100, 10, dtype=np.float32)[:, None], Y),
    test=ArrayDataset(-np.arange(0, 100, 10, dtype=np.float32)[:, None], Y),
    classes=("a", "b", "c"),
    scale=0.1,
    mean=(1.0,),
    std=(2.0,),
)
PARTS = Partition(
    train=(np.array([0, 1, 2, 3]), np.array([4, 5]), np.array([6]), np.array([], dtype=np.int64)),
    test=(np.array([9, 0]), np.array([1]), np.array([], dtype=np.int64), np.array([], dtype=np.int64)),
)
CLIENTS = ("w", "x", "y", "z")
TASK = Task(0, (0, 2), (5, 1), mask=(1, 5))


def test_a_client_gets_its_samples_of_the_task_normalised_with_columns_as_targets(device: torch.device) -> None:
    data = PartitionedData(SOURCE, PARTS, CLIENTS)
    train = data.train("w", TASK, device)
    assert train.x.tolist() == [[-0.5], [0.5], [1.0]]  # samples 0, 2, 3: (k - 1) / 2
    assert train.y.tolist() == [5, 1, 5]
    assert train.x.dtype == torch.float32
    assert train.y.dtype == torch.int64
    assert train.x.device.type == device.type
    test = data.test("w", TASK, device)
    assert test.x.tolist() == [[-5.0], [-0.5]]
    assert test.y.tolist() == [5, 5]
    assert data.train("y", TASK, device).y.tolist() == [5]


@pytest.mark.parametrize(("client", "task"), [("z", TASK), ("x", Task(0, (0,), (0,)))])
def test_no_samples_is_an_empty_task(device: torch.device, client: str, task: Task) -> None:
    data = PartitionedData(SOURCE, PARTS, CLIENTS).train(client, task, device)
    assert len(data) == 0
    assert data.x.shape == (0, 1)
    assert data.y.shape == (0,)


def test_transforms_are_part_of_the_task(device: torch.device) -> None:
    images = np.arange(8, dtype=np.float32).reshape(2, 1, 2, 2)
    half = ArrayDataset(images, np.array([0, 1]))
    both = Partition((np.array([0, 1]),), (np.array([0, 1]),))
    data = PartitionedData(Dataset(half, half, ("a", "b")), both, ("w",))
    plain = Task(0, (0, 1), (0, 1))
    turned = replace(plain, transform={"name": "rotate", "degrees": 90.0})
    assert data.train("w", plain, device).x.cpu().tolist() == images.tolist()
    torch.testing.assert_close(
        data.train("w", turned, device).x.cpu(), torch.rot90(torch.from_numpy(images), 1, (2, 3)), atol=1e-4, rtol=0
    )


def test_the_same_task_is_gathered_once_while_it_fits(device: torch.device) -> None:
    data = PartitionedData(SOURCE, PARTS, CLIENTS)
    first = data.train("w", TASK, device)
    assert data.train("w", replace(TASK, id=7, mask=None), device) is first  # same samples, same targets
    assert data.train("w", replace(TASK, columns=(1, 5)), device) is not first
    small = PartitionedData(SOURCE, PARTS, CLIENTS, cache_bytes=1)
    kept = small.train("w", TASK, device)
    assert small.train("w", TASK, device) is kept
    small.train("x", TASK, device)
    again = small.train("w", TASK, device)
    assert again is not kept
    assert torch.equal(again.x, kept.x)


def test_clients_and_parts_must_match() -> None:
    with pytest.raises(ValueError, match="zip"):
        PartitionedData(SOURCE, PARTS, ("w", "x"))
