"""Clients as they are in life: all samples of a speaker, a writer, a device, go to the same one."""

from __future__ import annotations

import numpy as np

from fedcl.data.dataset import Partition
from fedcl.data.parts import PartitionInput, matching_test


def natural_id(
    given: PartitionInput,
    *,
    column: str = "speaker",
) -> Partition:
    """Give each client all samples of one value of a meta column, or of several where there are more values.

    Values are shuffled and split into groups whose numbers of values differ by at most one; sizes are as they come. A
    client's test part is what the test half has of its values; where that is nothing, or the test half lacks the
    column, it follows the labels of the train part as with other partitioners.

    Raises
    ------
    ValueError
        The data have no such column, or fewer values than clients.
    """
    columns = given.train_meta or {}
    if column not in columns:
        there = ", ".join(sorted(columns)) or "none"
        raise ValueError(f"data.partition.column={column}: must be a meta column of the data; there are: {there}")
    values, owner_train = np.unique(columns[column], return_inverse=True)
    if not 1 <= given.num_clients <= len(values):
        raise ValueError(f"num_clients={given.num_clients}: must be in [1, {len(values)}], the values of {column}")
    groups = np.array_split(given.rng.permutation(len(values)), given.num_clients)
    train = tuple(np.flatnonzero(np.isin(owner_train, group)).astype(np.int64) for group in groups)
    test = matching_test(train, given)
    if given.test_meta and column in given.test_meta:
        own = (np.flatnonzero(np.isin(given.test_meta[column], values[group])).astype(np.int64) for group in groups)
        test = tuple(mine if len(mine) else drawn for mine, drawn in zip(own, test, strict=True))
    return Partition(train, test)
