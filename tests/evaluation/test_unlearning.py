from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fedcl.evaluation import membership, predictions
from fedcl.evaluation.unlearning import PARTS, Part, h_mean, metrics, recovery, revival, tug_of_war

Logits = dict[Part, Tensor]
SIZES: dict[Part, int] = {"forget_train": 8, "forget_test": 4, "retain_train": 10, "retain_test": 5}
TARGETS: Logits = {part: torch.arange(size) % 3 for part, size in SIZES.items()}


def logits(seed: int, right: float) -> Logits:
    """Random logits with ``right`` added to the target's."""
    generator = torch.Generator().manual_seed(seed)
    noise = {part: torch.randn(size, 3, generator=generator) for part, size in SIZES.items()}
    return {part: noise[part] + right * torch.eye(3)[TARGETS[part]] for part in PARTS}


def one_hot(*wrong: int) -> Logits:
    """Sure predictions, with the first ``wrong[i]`` samples of set i predicted wrong."""
    made: Logits = {}
    for part, count in zip(PARTS, wrong, strict=True):
        predicted = TARGETS[part].clone()
        predicted[:count] = (predicted[:count] + 1) % 3
        made[part] = 5 * torch.eye(3)[predicted]
    return made


UNLEARNED, ORIGINAL, REFERENCE, RANDOM = one_hot(6, 3, 1, 1), one_hot(0, 1, 0, 0), one_hot(8, 4, 0, 1), logits(3, 0)
FULL = metrics(TARGETS, UNLEARNED, original=ORIGINAL, reference=REFERENCE, random=RANDOM)


def test_accuracies_gaps_and_what_is_made_of_them_by_hand() -> None:
    expected = {
        "forget_train_accuracy": 2 / 8,
        "forget_test_accuracy": 1 / 4,
        "retain_train_accuracy": 9 / 10,
        "retain_test_accuracy": 4 / 5,
        "test_accuracy": 5 / 9,
        "gap/forget_train_accuracy": 2 / 8,
        "gap/forget_test_accuracy": 1 / 4,
        "gap/retain_train_accuracy": 1 / 10,
        "gap/retain_test_accuracy": 0.0,
        "gap/test_accuracy": 1 / 9,
        "tow": (1 - 2 / 8) * (1 - 1 / 10) * (1 - 1 / 9),
        # retain accuracy 4/5, drop 3/4 - 1/4
        "h_mean": 2 * 0.8 * 0.5 / 1.3,
    }
    assert {name: FULL[name] for name in expected} == pytest.approx(expected)
    mia = FULL["gap/mia_entropy"]
    assert FULL["tow_mia"] == pytest.approx((1 - mia) * 0.9 * (1 - 1 / 9))
    assert FULL["gap/average"] == pytest.approx((2 / 8 + 1 / 10 + 1 / 9 + mia) / 4)


def test_each_name_is_the_function_on_the_documented_sets() -> None:
    mine, reference, random = logits(0, 3), logits(1, 2), logits(2, 0)
    numbers = metrics(TARGETS, mine, reference=reference, random=random)
    test = torch.cat([mine["forget_test"], mine["retain_test"]])
    pairs = {
        "kl_forget": predictions.kl_divergence(reference["forget_train"], mine["forget_train"]),
        "kl_forget_reverse": predictions.kl_divergence(mine["forget_train"], reference["forget_train"]),
        "kl_retain": predictions.kl_divergence(reference["retain_train"], mine["retain_train"]),
        "kl_retain_reverse": predictions.kl_divergence(mine["retain_train"], reference["retain_train"]),
        "activation_distance": predictions.activation_distance(mine["forget_train"], reference["forget_train"]),
        "zrf": predictions.zrf(mine["forget_test"], random["forget_test"]),
        "zrf_train": predictions.zrf(mine["forget_train"], random["forget_train"]),
        "mia_entropy": membership.entropy_attack(mine["retain_train"], test, mine["forget_train"]),
    }
    assert {name: numbers[name] for name in pairs} == pytest.approx(pairs)
    zrf_gap = abs(pairs["zrf"] - predictions.zrf(reference["forget_test"], random["forget_test"]))
    assert numbers["gap/zrf"] == pytest.approx(zrf_gap)
    never = {part: predictions.margins(reference[part], TARGETS[part])[None] for part in PARTS}
    for holdout in ("forget_test", "retain_test"):
        numbers = metrics(TARGETS, mine, reference=reference, holdout=holdout, fpr=0.2)
        u, r = (
            membership.loss_auc(m["forget_train"], TARGETS["forget_train"], m[holdout], TARGETS[holdout])
            for m in (mine, reference)
        )
        assert (numbers["auc_loss"], numbers["priv_leak"]) == pytest.approx((u, (u - r) / r))
        attacked = [predictions.margins(mine[part], TARGETS[part]) for part in ("forget_train", holdout)]
        lira = membership.likelihood_ratio_attack(
            attacked[0], attacked[1], never["forget_train"], never[holdout], fpr=0.2
        )
        assert (numbers["lira_auc"], numbers["lira_tpr"]) == pytest.approx((lira.auc, lira.tpr))


def test_the_likelihood_ratio_of_two_shadows_by_hand() -> None:
    """Margins are z_y - z_other; the shadows' means are 1, 1, 0, 0, their variances 2, 0, 2, 0: one deviation of 1."""

    def model(forgotten: list[float], held_out: list[float]) -> dict[Part, torch.Tensor]:
        pairs: list[tuple[Part, list[float]]] = [("forget_train", forgotten), ("forget_test", held_out)]
        return {part: torch.tensor([[margin, 0.0] for margin in margins]) for part, margins in pairs}

    targets: dict[Part, torch.Tensor] = {part: torch.zeros(2).long() for part in ("forget_train", "forget_test")}
    attacked, reference = model([3, 1.5], [0.4, -1]), model([0, 0], [3, 3])
    shadows = [model([0, 1], [-1, 0]), model([2, 1], [1, 0])]
    # (m - mean) / 1: 2 and 0.5 of the forgotten, 0.4 and -1 of the others
    numbers = metrics(targets, attacked, shadows=shadows, fpr=0.0)
    assert (numbers["lira_auc"], numbers["lira_tpr"], numbers["lira_references"]) == (1.0, 1.0, 2.0)
    # by the first alone: 3 and 0.5 against 1.4 and -1, so one pair of four is in the wrong order
    alone = metrics(targets, attacked, shadows=shadows[:1], fpr=0.0)
    assert (alone["lira_auc"], alone["lira_tpr"], alone["lira_references"]) == (0.75, 0.5, 1.0)
    # the reference is attacked by the shadows too: -1 and -1 against 3 and 3; nothing is fitted to it
    both = metrics(targets, attacked, reference=reference, shadows=shadows, fpr=0.0)
    assert (both["lira_auc"], both["gap/lira_auc"], both["gap/lira_tpr"]) == (1.0, 1.0, 1.0)
    assert "gap/lira_references" not in both
    # without shadows it is all there is: 3 and 1.5 against -2.6 and -4, and it cannot be attacked itself
    one = metrics(targets, attacked, reference=reference, fpr=0.0)
    assert (one["lira_auc"], one["lira_references"], "gap/lira_auc" in one) == (1.0, 1.0, False)


def test_every_name_is_explained() -> None:
    text = (Path(__file__).resolve().parents[2] / "docs" / "metrics.md").read_text(encoding="utf-8")
    names = [*FULL, *revival([0.1], original=1.0, reference_N=[0.1])]
    explained = [name for name in names if not name.startswith("gap/")] + ["gap/NAME", "gap/average"]
    assert not [name for name in explained if f"`{name}`" not in text]


def test_the_reference_itself_has_no_gap() -> None:
    numbers = metrics(TARGETS, REFERENCE, original=ORIGINAL, reference=REFERENCE, random=RANDOM)
    assert numbers.keys() == FULL.keys()
    zero = [name for name in numbers if name.startswith(("gap/", "kl_"))] + ["activation_distance", "priv_leak"]
    assert {name: numbers[name] for name in zero} == pytest.approx(dict.fromkeys(zero, 0.0), abs=1e-12)
    assert (numbers["tow"], numbers["tow_mia"], numbers["lira_auc"]) == (1.0, 1.0, 0.5)


def test_without_a_reference_nothing_is_compared_with_one() -> None:
    numbers = metrics(TARGETS, UNLEARNED, original=ORIGINAL, random=RANDOM)
    assert set(FULL) - set(numbers) == {
        *(name for name in FULL if name.startswith(("gap/", "kl_", "lira_"))),
        *("tow", "tow_mia", "priv_leak", "activation_distance"),
    }
    assert numbers == {name: FULL[name] for name in numbers}
    alone = metrics(TARGETS, UNLEARNED)
    assert set(numbers) - set(alone) == {"h_mean", "zrf", "zrf_train", "zrf_legacy", "zrf_train_legacy"}


def test_sets_without_samples_leave_out_what_needs_them() -> None:
    def without(values: Logits) -> Logits:
        return values | {"forget_test": values["forget_test"][:0]}

    numbers = metrics(
        without(TARGETS), without(UNLEARNED), original=ORIGINAL | without(ORIGINAL), reference=without(REFERENCE)
    )
    assert not [name for name in numbers if name in ("forget_test_accuracy", "h_mean", "auc_loss", "lira_auc")]
    assert numbers["test_accuracy"] == numbers["retain_test_accuracy"] == 4 / 5
    assert "lira_auc" in metrics(
        without(TARGETS), without(UNLEARNED), reference=without(REFERENCE), holdout="retain_test"
    )
    assert metrics(TARGETS, {}) == {}


def test_a_diverged_model_has_no_numbers_rather_than_good_ones() -> None:
    broken: Logits = {part: torch.full_like(values, math.nan) for part, values in UNLEARNED.items()}
    numbers = metrics(TARGETS, broken, original=ORIGINAL, reference=REFERENCE, random=RANDOM)
    assert numbers.keys() == FULL.keys()
    assert all(math.isnan(value) for name, value in numbers.items() if name != "lira_references"), numbers


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="'test'"):
        metrics(TARGETS, {"test": torch.zeros(1, 3)})  # type: ignore[dict-item]
    with pytest.raises(ValueError, match="unlearned: set 'forget_train' must have targets"):
        metrics({}, UNLEARNED)
    with pytest.raises(ValueError, match=r"targets of shape \(8,\)"):
        metrics(TARGETS, UNLEARNED | {"forget_train": torch.zeros(7, 3)})
    with pytest.raises(ValueError, match=r"lacks \['forget_test'\]"):
        metrics(TARGETS, UNLEARNED, reference={part: REFERENCE[part] for part in PARTS if part != "forget_test"})
    with pytest.raises(ValueError, match="holdout='forget_train'"):
        metrics(TARGETS, UNLEARNED, holdout="forget_train")  # type: ignore[arg-type]


def test_tug_of_war_h_mean_and_recovery() -> None:
    assert tug_of_war({"a": 0.9, "b": 0.2}, {"a": 0.8, "b": 0.7}) == pytest.approx(0.9 * 0.5)
    assert tug_of_war({"a": 0.3}, {"a": 0.3}) == 1.0
    assert math.isnan(tug_of_war({}, {}))
    with pytest.raises(ValueError, match="must be the same"):
        tug_of_war({"a": 1.0}, {"b": 1.0})
    assert h_mean(0.8, 0.4) == pytest.approx(0.64 / 1.2)
    assert h_mean(0.0, 0.0) == h_mean(0.1, -0.1) == h_mean(0.8, -0.2) == 0.0
    assert recovery(0.7, 0.4, 0.8) == pytest.approx(0.75)
    assert math.isnan(recovery(0.7, 0.4, 0.4))


def test_revival_by_hand() -> None:
    curve = [math.nan, 0.1, 0.3, math.nan, 0.6, 0.5]
    numbers = revival(curve, original=0.9, reference_N=[0.0, 0.0, 0.1, 0.1, math.nan, 0.1])
    expected = {
        "revival/peak": 0.5,
        "revival/final": 0.4,
        "revival/delay": 4.0,
        "revival/excess": (0.1 + 0.2 + 0.4) / 3,
    }
    assert numbers == pytest.approx(expected)
    # how much counts as revived depends on the accuracy before the request
    assert revival(curve, original=0.6)["revival/delay"] == 2.0
    assert revival(curve, original=0.6, tau=1.0)["revival/delay"] == 4.0
    assert revival(curve, original=0.2)["revival/delay"] == 1.0
    never = revival([0.2, 0.1], original=0.9)
    assert math.isnan(never.pop("revival/delay"))
    assert never == pytest.approx({"revival/peak": 0.0, "revival/final": -0.1})
    assert all(math.isnan(value) for value in revival([], original=0.9).values())
    with pytest.raises(ValueError, match=r"reference of shape \(1,\)"):
        revival([0.1, 0.2], original=1.0, reference_N=[0.1])
