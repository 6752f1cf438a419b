from __future__ import annotations

import importlib.util
import sys
from typing import Any

import numpy as np
import pytest

from fedcl.data.dataset import Partition
from fedcl.data.flower import flwr
from fedcl.data.partition import PartitionInput, report

Y = np.repeat(np.arange(10), 30).astype(np.int64)
# What the library says of its own draws and of pyarrow is not what is tested here.
pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore:Specifying null_placement:FutureWarning"),
]
needs_flwr_datasets = pytest.mark.skipif(
    importlib.util.find_spec("flwr_datasets") is None, reason="flwr-datasets is not installed"
)


def call(partitioner: str, params: dict[str, Any] | None = None, num_clients: int = 6, seed: int = 0) -> Partition:
    columns = {"writer": np.array([f"w{i % 6}" for i in range(len(Y))])}
    given = PartitionInput(Y, Y[::3], num_clients, 10, np.random.default_rng(seed), columns)
    return flwr(given, partitioner=partitioner, params=params)


@needs_flwr_datasets
@pytest.mark.parametrize(
    ("partitioner", "params"),
    [
        ("IidPartitioner", {}),
        ("DirichletPartitioner", {"alpha": 1.0, "min_partition_size": 1}),
        ("ShardPartitioner", {"num_shards_per_partition": 2}),
        ("PathologicalPartitioner", {"num_classes_per_partition": 5, "class_assignment_mode": "deterministic"}),
        ("LinearPartitioner", {}),
        ("SizePartitioner", {"partition_sizes": [100, 100, 50, 25, 15, 10]}),
        ("NaturalIdPartitioner", {"partition_by": "writer"}),
    ],
)
def test_flowers_partitioners_divide_the_samples(partitioner: str, params: dict[str, Any]) -> None:
    partition = call(partitioner, params)
    found = report(partition, Y)
    assert (found["coverage"], found["samples_shared"]) == (1.0, 0)
    for train, test in zip(partition.train, partition.test, strict=True):
        assert train.dtype == np.int64
        assert set(Y[::3][test]) <= set(Y[train])


@needs_flwr_datasets
def test_the_draw_follows_the_runs_seed() -> None:
    first, again = (call("IidPartitioner") for _ in range(2))
    assert all(np.array_equal(a, b) for a, b in zip(first.train, again.train, strict=True))
    for name, params in (("DirichletPartitioner", {"alpha": 1.0, "min_partition_size": 1}), ("IidPartitioner", {})):
        first, other = (call(name, params, seed=seed) for seed in (0, 1))
        assert any(not np.array_equal(a, b) for a, b in zip(first.train, other.train, strict=True))


@needs_flwr_datasets
def test_an_iid_partition_is_one_though_the_file_is_sorted() -> None:
    assert min(len(np.unique(Y[part])) for part in call("IidPartitioner").train) >= 8


@needs_flwr_datasets
@pytest.mark.parametrize(
    ("partitioner", "params", "message"),
    [
        ("SemanticPartitioner", {}, r"partitioner=SemanticPartitioner: must be one of ContinuousPartitioner"),
        ("Partitioner", {}, r"partitioner=Partitioner: must be one of"),
        ("DirichletPartitioner", {}, r"with data\.partition\.params=\{\}: .*alpha"),
        ("DirichletPartitioner", {"alpha": -1.0}, r"with data\.partition\.params=\{'alpha': -1\.0\}"),
        ("DirichletPartitioner", {"alpha": 0.01, "min_partition_size": 40}, r"with data\.partition\.params"),
        ("SizePartitioner", {"partition_sizes": [200, 100]}, "makes 2 parts for num_clients=6"),
        ("VerticalEvenPartitioner", {}, "divides columns, not samples"),
    ],
)
def test_what_flower_refuses_is_told_in_one_line(partitioner: str, params: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        call(partitioner, params)
    assert "\n" not in str(caught.value)


def test_without_the_library_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flwr_datasets", None)
    with pytest.raises(ValueError, match="data/partition=flwr: needs the package flwr-datasets"):
        call("IidPartitioner")
