"""Flower's partitioners, on a table that holds the labels and the positions and nothing else."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedcl.data.dataset import Indices, Partition
from fedcl.data.parts import PartitionInput, require_samples, with_matching_test

_POSITION = "position"


def flwr(
    given: PartitionInput,
    *,
    partitioner: str = "IidPartitioner",
    params: Mapping[str, Any] | None = None,
) -> Partition:
    """Partition by a class of ``flwr_datasets.partitioner``.

    The table it sees has the columns ``label``, ``position`` and the meta columns, its rows shuffled: several of the
    classes, ``IidPartitioner`` among them, deal samples out in the order of the file. ``num_partitions``,
    ``partition_by="label"`` and ``seed`` are filled in where the class takes them and ``params`` does not. What the
    class does with samples is its own matter: some leave samples out, which the run's partition report counts.

    Raises
    ------
    ValueError
        flwr-datasets is not installed, there is no such class, it refuses its parameters or the labels, or makes
        another number of parts.
    """
    place = f"data.partition.partitioner={partitioner}"
    cls = _find(partitioner)
    require_samples(given.y_train, given.num_clients, 1)
    order = given.rng.permutation(len(given.y_train))
    columns = {"label": given.y_train, _POSITION: np.arange(len(given.y_train)), **(given.train_meta or {})}
    table = {name: column[order] for name, column in columns.items()}
    arguments = dict(params or {})
    filled = {"num_partitions": given.num_clients, "partition_by": "label", "seed": int(given.rng.integers(2**31))}
    accepted = inspect.signature(cls).parameters
    arguments = {name: value for name, value in filled.items() if name in accepted} | arguments
    try:
        parts = _parts(cls(**arguments), table)
    except (TypeError, ValueError, KeyError, IndexError) as error:
        reason = str(error).split("\n")[0]
        raise ValueError(f"{place}: with data.partition.params={dict(params or {})}: {reason}") from error
    if len(parts) != given.num_clients:
        raise ValueError(f"{place}: makes {len(parts)} parts for num_clients={given.num_clients}")
    return with_matching_test(parts, given)


def _find(partitioner: str) -> Any:
    try:
        from flwr_datasets import partitioner as classes
    except ImportError as error:
        raise ValueError("data/partition=flwr: needs the package flwr-datasets: pip install 'fedcl[hf]'") from error
    if partitioner == "Partitioner" or partitioner not in classes.__all__:
        known = ", ".join(sorted(set(classes.__all__) - {"Partitioner"}))
        raise ValueError(f"data.partition.partitioner={partitioner}: must be one of {known}")
    return getattr(classes, partitioner)


def _parts(partitioner: Any, table: Mapping[str, NDArray[Any]]) -> list[Indices]:
    from datasets import Dataset

    partitioner.dataset = Dataset.from_dict({name: list(column.tolist()) for name, column in table.items()})
    parts = []
    for client in range(partitioner.num_partitions):
        part = partitioner.load_partition(client)
        if _POSITION not in part.column_names:
            raise ValueError("divides columns, not samples")
        parts.append(np.asarray(part[_POSITION], np.int64))
    return parts
