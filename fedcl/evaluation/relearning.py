"""What a model still holds although its outputs do not show it: how soon it relearns, what a linear classifier finds.

Removing one column stops a model from predicting a class, while everything it knew about the class stays in place.
These metrics look behind the outputs. Like all others they mean something only next to those of the retrained
reference: with features that transfer, a model that never saw a class also learns it soon and separates it linearly.
Every function works on a copy and leaves the given model unchanged.
"""

# N = samples, P = length of the flat vector, F = features, C = classes
from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from fedcl.evaluation.predictions import NAN, accuracy, allow, hits, mean, predict
from fedcl.models.flat import FlatModel


class Samples(NamedTuple):
    """Inputs (or features) ``x`` (N, ...) and their targets ``y`` (N,)."""

    x: Tensor
    y: Tensor


@dataclass(frozen=True, slots=True)
class Training:
    """How a copy is trained on: SGD at ``learning_rate`` with ``momentum``, over logits of ``columns`` (None: all)."""

    learning_rate: float = 0.01
    momentum: float = 0.9
    columns: Sequence[int] | None = None

    def __post_init__(self) -> None:
        if not self.learning_rate > 0 or not 0 <= self.momentum < 1:
            raise ValueError(f"learning_rate={self.learning_rate}, momentum={self.momentum}: must be > 0 and in [0, 1)")


@dataclass(frozen=True, slots=True)
class Relearned:
    """Steps taken, whether the accuracy asked for was ``reached`` in them, and the accuracy before and after each."""

    steps: int
    reached: bool
    curve: tuple[float, ...]


_DEFAULT = Training()


def relearn_steps(
    model: FlatModel,
    vector: Tensor,
    forget: Samples,
    test: Samples,
    *,
    original_accuracy: float,
    generator: torch.Generator,
    tau: float = 0.9,
    shots: int = 16,
    max_steps: int = 100,
    training: Training = _DEFAULT,
) -> Relearned:
    """Train on ``shots`` forget samples until accuracy on the forget test samples is tau times the original model's.

    Each step takes the gradient of the mean cross-entropy over all shots, which are drawn once without replacement
    (all forget samples where there are fewer); 0 steps mean that nothing had to be relearned. The relearn time of
    Golatkar et al., CVPR 2020, and Chundawat et al., "Zero-Shot Machine Unlearning", 2023, counted in steps.

    Parameters
    ----------
    model, vector
        The network and the unlearned weights (P,).
    forget, test
        Forget training samples to draw from, and forget test samples.
    original_accuracy
        Accuracy in [0, 1] on ``test`` before anything was unlearned.
    generator
        Draws the shots, and what random layers draw.
    tau, shots, max_steps, training
        Share of the original accuracy in (0, 1]; how many samples; when to give up; the optimiser.

    Raises
    ------
    ValueError
        A parameter out of range, or no forget or no test samples.
    """
    if not 0 < tau <= 1 or shots < 1 or max_steps < 0:
        raise ValueError(f"tau={tau}, shots={shots}, max_steps={max_steps}: must be in (0, 1], >= 1 and >= 0")
    if not len(forget.y) or not len(test.y):
        raise ValueError(f"{len(forget.y)} forget and {len(test.y)} test samples: must be >= 1")
    student = _student(model, vector, generator)
    chosen = torch.randperm(len(forget.y), generator=generator)[:shots].to(forget.y.device)
    few = Samples(forget.x[chosen], forget.y[chosen])
    step = _stepper(student, training)
    curve = [_accuracy(student, test, training)]
    while not curve[-1] >= tau * original_accuracy and len(curve) <= max_steps:
        step(few)
        curve.append(_accuracy(student, test, training))
    return Relearned(len(curve) - 1, curve[-1] >= tau * original_accuracy, tuple(curve))


def anamnesis_index(unlearned: Relearned, reference: Relearned) -> float:
    """Return AIN = steps of the unlearned model / steps of the retrained one: 1 is ideal, below 1 something was left.

    Chundawat et al., 2023, as commonly implemented. NaN where the reference needed none, or either did not get there.
    """
    if not (unlearned.reached and reference.reached and reference.steps):
        return NAN
    return unlearned.steps / reference.steps


def relearn_from_retain(
    model: FlatModel,
    vector: Tensor,
    retain: Samples,
    test: Samples,
    *,
    generator: torch.Generator,
    epochs: int = 5,
    batch_size: int = 64,
    training: Training = _DEFAULT,
) -> tuple[float, ...]:
    """Return accuracy on the forget ``test`` samples before and after each epoch of training on retain samples alone.

    What comes back although nothing of the forget set is shown was hidden, not removed. NaN without test samples.
    Raises ``ValueError`` for fewer than one epoch or one sample a batch.
    """
    if epochs < 1 or batch_size < 1:
        raise ValueError(f"epochs={epochs}, batch_size={batch_size}: must be >= 1")
    student = _student(model, vector, generator)
    step = _stepper(student, training)
    curve = [_accuracy(student, test, training)]
    for _ in range(epochs):
        order = torch.randperm(len(retain.y), generator=generator).to(retain.y.device)
        for rows in torch.split(order, batch_size):
            if len(rows):
                step(Samples(retain.x[rows], retain.y[rows]))
        curve.append(_accuracy(student, test, training))
    return tuple(curve)


def linear_probe(train: Samples, test: Samples, *, ridge: float = 1e-3) -> float:
    """Return the share of ``test`` features that a linear classifier fitted to ``train`` features gets right.

    One-vs-rest ridge regression in closed form: with weights s_i that sum to 1, equal for all classes together (so
    that a rare class is not outvoted), and features and one-hot targets centred by their weighted means,
    W = (X' S X + ridge tr(X' S X) / F I)^-1 X' S Y, and the largest of x W + y_mean is predicted. To ask for a
    forgotten class, fit to all training features, its own included, and test on its test features; take the features
    from ``predictions.predict``.

    Parameters
    ----------
    train, test
        Penultimate features (N, F) and targets (N,).
    ridge
        Penalty relative to the mean variance of a feature; > 0.

    Returns
    -------
    float
        In [0, 1]; NaN without train or test samples.

    Raises
    ------
    ValueError
        ``ridge`` is not positive.
    """
    if not ridge > 0:
        raise ValueError(f"ridge={ridge}: must be > 0")
    if not len(train.y) or not len(test.y):
        return NAN
    x_NF, y_N = train.x.double(), train.y.to(train.x.device)
    y_NC = functional.one_hot(y_N, max(int(y_N.max()), int(test.y.max())) + 1).double()
    counts = y_NC.sum(0)
    share_N = (1 / counts)[y_N] / (counts > 0).sum()
    x_mean, y_mean = share_N @ x_NF, share_N @ y_NC
    centred_NF = x_NF - x_mean
    gram_FF = centred_NF.T @ (share_N[:, None] * centred_NF)
    penalty = ridge * gram_FF.diagonal().mean()
    if not penalty > 0:  # no feature varies: every class looks the same
        return mean(hits(y_mean.expand(len(test.y), -1), test.y))
    eye_FF = torch.eye(len(gram_FF), dtype=gram_FF.dtype, device=gram_FF.device)
    moment_FC = centred_NF.T @ (share_N[:, None] * (y_NC - y_mean))
    weight_FC = torch.linalg.solve(gram_FF + penalty * eye_FF, moment_FC)
    return accuracy((test.x.double() - x_mean) @ weight_FC + y_mean, test.y)


def _student(model: FlatModel, vector: Tensor, generator: torch.Generator) -> FlatModel:
    student = model.copy()
    student.load(vector)
    student.set_generator(generator)
    return student


def _stepper(student: FlatModel, training: Training) -> Callable[[Samples], None]:
    optimiser = torch.optim.SGD(student.trainable, lr=training.learning_rate, momentum=training.momentum)

    def step(batch: Samples) -> None:
        student.train()
        optimiser.zero_grad()
        logits = allow(student(batch.x.to(student.device)).logits, training.columns)
        torch.autograd.backward(functional.cross_entropy(logits, batch.y.to(student.device)))
        optimiser.step()

    return step


def _accuracy(student: FlatModel, test: Samples, training: Training) -> float:
    logits = predict(student, student.vector(), test.x, columns=training.columns).logits
    return accuracy(logits, test.y)
