"""Long cross-products of parameters: a sample of them by default, the others with -m slow."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import product
from typing import Any

import pytest


def sampled(*axes: Iterable[Any], every: int) -> list[Any]:
    """Return the parameters of the product of ``axes``, all but every ``every``-th of each line marked as slow.

    Those that stay are the ones whose places add up to a multiple of ``every``, as in a Latin square: each value of an
    axis is met in company of every ``every``-th value of the others. The last axis must have ``every`` values or more,
    so that each combination of the others is met by default.
    """
    lines = [list(axis) for axis in axes]
    assert len(lines[-1]) >= every, f"the last axis has {len(lines[-1])} values: must be {every} or more"
    return [
        pytest.param(*values, marks=() if sum(places) % every == 0 else pytest.mark.slow)
        for places, values in zip(product(*(range(len(line)) for line in lines)), product(*lines), strict=True)
    ]
