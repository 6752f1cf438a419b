"""Unlearning metrics: what a model that was asked to forget still knows, and how it differs from a retrained one.

Four sets of samples: the forget and the retain set, of each the training samples and the test samples that are like
them (of a forgotten class, its test samples; of a client that left, its own). A retrained model, the reference, is the
yardstick: one that never saw the forget set does not have to be at 0, nor at chance. Single numbers are easily made to
look good, so all of them are reported together; those that need a model or a set that is not there are left out.
"""

# N = samples, C = columns; u, r, o = unlearned, reference (retrained), original model
from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, get_args

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from fedcl.evaluation import membership, predictions
from fedcl.evaluation.predictions import NAN

Part = Literal["forget_train", "forget_test", "retain_train", "retain_test"]
PARTS: tuple[Part, ...] = get_args(Part)
Tensors = Mapping[Part, Tensor]
Holdout = Literal["forget_test", "retain_test"]
HOLDOUTS: tuple[Holdout, ...] = get_args(Holdout)
_AVERAGED = ("forget_train_accuracy", "retain_train_accuracy", "test_accuracy", "mia_entropy")


def metrics(
    targets: Tensors,
    unlearned: Tensors,
    *,
    original: Tensors | None = None,
    reference: Tensors | None = None,
    random: Tensors | None = None,
    shadows: Sequence[Tensors] = (),
    holdout: Holdout = "forget_test",
    fpr: float = 0.01,
) -> dict[str, float]:
    """Return every number that can be computed from the given logits, by name; ``docs/metrics.md`` lists them.

    Names that compare with the reference are absent without it, and those that need a set that is absent or empty are
    absent too. For the reference's own numbers, give its logits as ``unlearned``.

    Parameters
    ----------
    targets
        Set -> targets (N,).
    unlearned, original, reference, random
        Set -> logits (N, C) of the model asked to forget, of the one before it, of a retrained and of a randomly
        initialised one; columns that may not be predicted are -inf. A model need not have all of the sets, but the
        reference must have those of the unlearned model.
    shadows
        Logits of further retrained models, drawn apart from all of the others: what the likelihood-ratio attack is
        fitted to. Without any it has the reference alone, which shares the unlearned model's draws.
    holdout
        The set that membership of the forget training samples is told apart from: untrained on, and otherwise like
        them. Give ``retain_test`` where the forget set has no test samples of its own.
    fpr
        False-positive rate of ``lira_tpr``.

    Raises
    ------
    ValueError
        An unknown set or holdout, a set without targets, one that the reference lacks, or shapes that do not match.
    """
    if holdout not in HOLDOUTS:
        raise ValueError(f"holdout={holdout!r}: must be one of {', '.join(HOLDOUTS)}")
    mine = _present("unlearned", unlearned, targets)
    noise = _present("random", random or {}, targets)
    never = [_present("shadows", one, targets) for one in shadows]
    numbers = _own(targets, mine, noise, holdout) | _lira(targets, mine, never, holdout, fpr)
    before = _present("original", original or {}, targets).get("forget_test")
    if before is not None and {"forget_test", "retain_test"} <= mine.keys():
        drop = predictions.accuracy(before, targets["forget_test"]) - numbers["forget_test_accuracy"]
        numbers["h_mean"] = h_mean(numbers["retain_test_accuracy"], drop)
    if reference is None:
        return numbers
    ideal = _present("reference", reference, targets)
    if mine.keys() - ideal.keys():
        raise ValueError(f"reference: lacks {sorted(mine.keys() - ideal.keys())}, which the unlearned model has")
    # a number over several sets must be over the same ones for both
    ideal = {part: ideal[part] for part in mine}
    its = _own(targets, ideal, noise, holdout) | _lira(targets, ideal, never, holdout, fpr)
    found = numbers | _gaps(numbers, its) | _divergences(mine, ideal)
    return found if never else found | _lira(targets, mine, [ideal], holdout, fpr)


def tug_of_war(unlearned: Mapping[str, float], reference: Mapping[str, float]) -> float:
    """Return ToW = prod_s (1 - |a_s(u) - a_s(r)|) over the sets s of ``reference``, in [0, 1]; 1 is no difference.

    Zhao et al., "What Makes Unlearning Hard and What to Do About It", NeurIPS 2024 (RUM): accuracies in [0, 1] on
    forget training, retain training and test samples; ToW-MIA has the membership attack's rate in place of the first.
    NaN of no sets. Raises ``ValueError`` where the two have different sets.
    """
    if unlearned.keys() != reference.keys():
        raise ValueError(f"sets {sorted(unlearned)} and {sorted(reference)}: must be the same")
    return float(np.prod([1 - abs(unlearned[s] - reference[s]) for s in reference])) if reference else NAN


def h_mean(retain_accuracy: float, drop: float) -> float:
    """Return 2 a d / (a + d) of retain accuracy a and drop in forget accuracy d = a_F(o) - a_F(u), in [0, 1].

    Zhao et al., "Continual Forgetting for Pre-trained Vision Models", CVPR 2024 (GS-LoRA). A drop below 0 counts as 0,
    as the formula has a pole there; of 0 and 0 it is 0.
    """
    drop = 0.0 if drop < 0 else drop
    return 2 * retain_accuracy * drop / (retain_accuracy + drop) if retain_accuracy + drop else 0.0


def recovery(unlearned: float, corrupted: float, clean: float) -> float:
    """Return (a_u - a_corrupted) / (a_clean - a_corrupted): 0 is as corrupted as before, 1 as if never corrupted.

    Rezaei et al., "RESTOR: Knowledge Recovery in Machine Unlearning", 2024: accuracies on samples whose answers the
    forget set (a poisoned client's, say) had spoilt, of the unlearned, the corrupted and the clean model. May be
    outside of [0, 1]; NaN where the corruption changed nothing.
    """
    return (unlearned - corrupted) / (clean - corrupted) if clean != corrupted else NAN


def backdoor(logits: Mapping[str, Tensor], targets_N: Tensor, target_class: int) -> dict[str, float]:
    """Return how often a trigger works on each model, and how much of its victims' accuracy is recovered.

    - ``PREFIXbackdoor``: :func:`predictions.backdoor_success` of each model given.
    - ``recovery``: :func:`recovery` of accuracy on samples that carry the trigger, the original as the corrupted and
      the reference as the clean model; absent without both.

    Parameters
    ----------
    logits
        Prefix (none for the unlearned model, ``original/``, ``reference/``) -> logits (N, C) of samples with a trigger.
    targets_N
        Their true classes.
    target_class
        What the attacker wants them to be called.
    """
    numbers = {
        f"{name}backdoor": predictions.backdoor_success(values, targets_N, target_class)
        for name, values in logits.items()
    }
    if {"", "original/", "reference/"} <= logits.keys():
        right = {name: predictions.accuracy(values, targets_N) for name, values in logits.items()}
        numbers["recovery"] = recovery(right[""], right["original/"], right["reference/"])
    return numbers


def revival(
    curve_N: ArrayLike, *, original: float, tau: float = 0.5, reference_N: ArrayLike | None = None
) -> dict[str, float]:
    """Return how far forget accuracy comes back while training goes on after a request was processed.

    - ``revival/peak``, ``revival/final``: the highest and the last accuracy, each minus the first.
    - ``revival/delay``: evaluations from the first until the accuracy is at least ``tau`` times ``original``: NaN if it
      never is, 0 if it was so from the start.
    - ``revival/excess``: mean of curve minus reference, a retrained model that went through the same training; absent
      without one.

    Parameters
    ----------
    curve_N
        Accuracy on forget test samples, just after processing and at each later evaluation; NaN where not measured,
        which is ignored.
    original
        Their accuracy before the request.
    tau
        Share of it that counts as revived.
    reference_N
        The reference's accuracy at the same evaluations.

    Raises
    ------
    ValueError
        The reference has another length.
    """
    curve = np.asarray(curve_N, dtype=np.float64)
    measured = np.flatnonzero(~np.isnan(curve))
    first, last = (curve[measured[0]], curve[measured[-1]]) if len(measured) else (NAN, NAN)
    revived = measured[curve[measured] >= tau * original]
    numbers = {
        "revival/peak": float(curve[measured].max() - first) if len(measured) else NAN,
        "revival/final": float(last - first),
        "revival/delay": float(revived[0]) if len(revived) else NAN,
    }
    if reference_N is not None:
        reference = np.asarray(reference_N, dtype=np.float64)
        if reference.shape != curve.shape:
            raise ValueError(f"reference of shape {reference.shape}: must be {curve.shape} as the curve")
        excess = (curve - reference)[~np.isnan(curve - reference)]
        numbers["revival/excess"] = float(excess.mean()) if len(excess) else NAN
    return numbers


def _present(name: str, logits: Tensors, targets: Tensors) -> dict[Part, Tensor]:
    """Return the sets that have samples, after checking all of them."""
    for part, values in logits.items():
        if part not in PARTS or part not in targets:
            raise ValueError(f"{name}: set {part!r} must have targets and be one of {', '.join(PARTS)}")
        if values.ndim != 2 or targets[part].shape != values.shape[:1]:
            raise ValueError(
                f"{name}: logits of shape {tuple(values.shape)} and targets of shape {tuple(targets[part].shape)} "
                f"on {part}: must be (N, C) and (N,)"
            )
    return {part: logits[part] for part in PARTS if part in logits and len(logits[part])}


def _own(targets: Tensors, logits: Tensors, random: Tensors, holdout: Holdout) -> dict[str, float]:
    """Return what needs no other model but a random one."""
    numbers = {f"{part}_accuracy": predictions.accuracy(logits[part], targets[part]) for part in logits}
    tests: list[Part] = [part for part in ("forget_test", "retain_test") if part in logits]
    if tests:
        test_NC = torch.cat([logits[part] for part in tests])
        numbers["test_accuracy"] = predictions.accuracy(test_NC, torch.cat([targets[part] for part in tests]))
        if {"forget_train", "retain_train"} <= logits.keys():
            numbers["mia_entropy"] = membership.entropy_attack(logits["retain_train"], test_NC, logits["forget_train"])
    if {"forget_train", holdout} <= logits.keys():
        asked = logits["forget_train"], targets["forget_train"]
        numbers["auc_loss"] = membership.loss_auc(*asked, logits[holdout], targets[holdout])
    zrf_of: dict[str, Part] = {"zrf": "forget_test", "zrf_train": "forget_train"}
    for name, part in zrf_of.items():
        if part in logits and part in random:
            numbers[name] = predictions.zrf(logits[part], random[part])
            numbers[f"{name}_legacy"] = predictions.zrf(logits[part], random[part], "legacy")
    return numbers


def _gaps(numbers: Mapping[str, float], ideal: Mapping[str, float]) -> dict[str, float]:
    """Return distances of what both models have a number of."""
    shared = (numbers.keys() & ideal.keys()) - {"lira_references"}
    gaps = {f"gap/{name}": abs(value - ideal[name]) for name, value in numbers.items() if name in shared}
    if all(f"gap/{name}" in gaps for name in _AVERAGED):
        gaps["gap/average"] = float(np.mean([gaps[f"gap/{name}"] for name in _AVERAGED]))
    first = {"tow": "forget_train_accuracy", "tow_mia": "mia_entropy"}
    for name, forgotten in first.items():
        sets = (forgotten, "retain_train_accuracy", "test_accuracy")
        if all(f"gap/{one}" in gaps for one in sets):
            gaps[name] = tug_of_war({one: numbers[one] for one in sets}, {one: ideal[one] for one in sets})
    if "gap/auc_loss" in gaps:
        gaps["priv_leak"] = membership.priv_leak(numbers["auc_loss"], ideal["auc_loss"])
    return gaps


def _divergences(unlearned: Tensors, reference: Tensors) -> dict[str, float]:
    numbers = {}
    sides: dict[str, Part] = {"forget": "forget_train", "retain": "retain_train"}
    for side, part in sides.items():
        if part in unlearned:
            numbers[f"kl_{side}"] = predictions.kl_divergence(reference[part], unlearned[part])
            numbers[f"kl_{side}_reverse"] = predictions.kl_divergence(unlearned[part], reference[part])
    if "forget_train" in unlearned:
        distance = predictions.activation_distance(unlearned["forget_train"], reference["forget_train"])
        numbers["activation_distance"] = distance
    return numbers


def _lira(
    targets: Tensors, attacked: Tensors, never: Sequence[Tensors], holdout: Holdout, fpr: float
) -> dict[str, float]:
    """Return what the likelihood-ratio attack makes of a model, by models that ``never`` saw any of the samples."""
    asked: tuple[Part, Part] = ("forget_train", holdout)
    if not never or not all(part in model for model in (attacked, *never) for part in asked):
        return {}
    forget, other = (predictions.margins(attacked[part], targets[part]) for part in asked)
    known = [torch.stack([predictions.margins(model[part], targets[part]) for model in never]) for part in asked]
    attack = membership.likelihood_ratio_attack(forget, other, known[0], known[1], fpr=fpr)
    return {"lira_auc": attack.auc, "lira_tpr": attack.tpr, "lira_references": float(attack.num_references)}
