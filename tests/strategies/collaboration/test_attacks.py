from __future__ import annotations

import pytest
import torch

from fedcl.base.randomness import torch_generator
from fedcl.data.dataset import ArrayDataset, Dataset
from tests.strategies.attacks import ATTACKS, RULES, alie, attacked, flipped, ipm, sign_flip

# Accuracies are some 0.87 where nobody lies, and 0.1 is chance; benchmarks/robust_digits has all of them.
BROKEN, SOUND = 0.3, 0.7
FALLS = {("fedavg", "sign_flip")}  # at any share


def test_forgeries_by_hand() -> None:
    honest = torch.tensor([[1.0, 0.0], [3.0, 0.0], [5.0, 6.0]], dtype=torch.float64)
    own = torch.tensor([2.0, -1.0], dtype=torch.float64)
    assert sign_flip(honest, own).tolist() == [-20, 10]
    assert ipm(honest, own).tolist() == pytest.approx([-3.3, -2.2])
    assert alie(honest, own).tolist() == pytest.approx([3 - 1.5 * 2, 2 - 1.5 * 12**0.5])
    spread = torch.randn(50, 4, generator=torch_generator("alie"), dtype=torch.float64)
    forged = alie(spread, own)
    assert bool(((forged > spread.min(0).values) & (forged < spread.max(0).values)).all())  # nobody could tell


def test_labels_are_flipped_where_they_should_be() -> None:
    half = ArrayDataset(torch.zeros(4, 2).numpy(), torch.tensor([0, 1, 2, 2]).numpy())
    poisoned = flipped(Dataset(half, half, ("a", "b", "c")), [0, 3])
    assert poisoned.train.y.tolist() == [2, 1, 2, 0]
    assert poisoned.test.y.tolist() == [0, 1, 2, 2]


def test_liars_change_the_run_and_nobody_lies_without_them() -> None:
    plain, diary = attacked("fedavg", None, 0, rounds=2)
    again, same = attacked("fedavg", "ipm", 0, rounds=2)
    assert (plain, diary.rows) == (again, same.rows)
    forged, _ = attacked("fedavg", "ipm", 3, rounds=2)
    assert forged < plain


CASES = [(rule, attack, liars) for rule in RULES for attack in ATTACKS for liars in (1, 2, 3)]
QUICK = {("fedavg", "sign_flip", 1), *((rule, "sign_flip", 3) for rule in ("median", "multi_krum", "geometric_median"))}


@pytest.mark.parametrize(
    ("rule", "attack", "liars"),
    [case if case in QUICK else pytest.param(*case, marks=pytest.mark.slow) for case in CASES],
)
def test_who_survives_whom(rule: str, attack: str, liars: int) -> None:
    accuracy, _ = attacked(rule, attack, liars)
    if (rule, attack) in FALLS:
        assert accuracy < BROKEN
    else:
        assert accuracy > SOUND
