"""Clients as they are in life: all samples of a speaker, a writer, a device, go to the same one."""

from __future__ import annotations

import numpy as np

from fedcl.data.dataset import Meta, Partition
from fedcl.data.parts import Labels, matching_test


def natural_id(
    y_train: Labels,
    y_test: Labels,
    *,
    num_clients: int,
    num_classes: int,
    rng: np.random.Generator,
    train_meta: Meta | None = None,
    test_meta: Meta | None = None,
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
    columns = train_meta or {}
    if column not in columns:
        there = ", ".join(sorted(columns)) or "none"
        raise ValueError(f"data.partition.column={column}: must be a meta column of the data; there are: {there}")
    values, owner_train = np.unique(columns[column], return_inverse=True)
    if not 1 <= num_clients <= len(values):
        raise ValueError(f"num_clients={num_clients}: must be in [1, {len(values)}], the values of {column}")
    groups = np.array_split(rng.permutation(len(values)), num_clients)
    train = tuple(np.flatnonzero(np.isin(owner_train, group)).astype(np.int64) for group in groups)
    test = matching_test(y_train, y_test, train, num_classes=num_classes, rng=rng)
    if test_meta and column in test_meta:
        own = (np.flatnonzero(np.isin(test_meta[column], values[group])).astype(np.int64) for group in groups)
        test = tuple(mine if len(mine) else drawn for mine, drawn in zip(own, test, strict=True))
    return Partition(train, test)
