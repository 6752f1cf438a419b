from __future__ import annotations

import torch

from fedcl.contracts.strategy import GLOBAL, Update
from fedcl.models.flat import Spec, TensorSpec
from fedcl.server.aggregation import aggregate
from strategies.collaboration.fedavg import FedAvg

SPEC = Spec([TensorSpec("w", (2,), 0, 2, "parameter", None)])


def updates() -> list[Update | None]:
    base = torch.tensor([1.0, 2.0])
    models = [[2.0, 2.0], [5.0, 0.0], [1.0, 6.0]]
    sizes = [1, 2, 5]
    return [
        Update(str(i), 0, GLOBAL, 0, base, torch.tensor(m), n, float(n), 0, 0)
        for i, (m, n) in enumerate(zip(models, sizes, strict=True))
    ]


def test_weighted_by_samples() -> None:
    mean = aggregate(updates(), FedAvg().term, SPEC).mean()
    assert mean.tolist() == [(1 * 1 + 2 * 4 + 5 * 0) / 8, (1 * 0 + 2 * -2 + 5 * 4) / 8]


def test_uniform() -> None:
    mean = aggregate(updates(), FedAvg(weighting="uniform").term, SPEC).mean()
    torch.testing.assert_close(mean, torch.tensor([5 / 3, 2 / 3], dtype=torch.float64), rtol=0, atol=1e-15)


def test_a_staleness_weight_counts_in_both() -> None:
    for weighting, expected in (("num_examples", (1 + 1 * 4) / (1 + 1 + 5)), ("uniform", (1 + 0.5 * 4) / 2.5)):
        late = updates()
        assert late[1] is not None
        late[1].weight *= 0.5
        mean = aggregate(late, FedAvg(weighting=weighting).term, SPEC).mean()  # type: ignore[arg-type]
        torch.testing.assert_close(mean[0].item(), expected)
