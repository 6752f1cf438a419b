from __future__ import annotations

import math
from functools import partial
from typing import NamedTuple

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import Ridge
from torch import Tensor

from fedcl.evaluation.predictions import accuracy, predict
from fedcl.evaluation.relearning import (
    Relearned,
    Samples,
    Training,
    anamnesis_index,
    linear_probe,
    relearn_from_retain,
    relearn_steps,
)
from fedcl.evaluation.unlearning import PARTS, Part, metrics
from fedcl.models.flat import FlatModel
from fedcl.models.networks import MLP, build_model

FORGOTTEN = 3


class Digits(NamedTuple):
    """Class 3 of ten is to be forgotten; ``hidden``: the original model whose column of it was shut by its bias."""

    model: FlatModel
    sets: dict[Part, Samples]
    initial: Tensor
    original: Tensor
    retrained: Tensor
    hidden: Tensor

    def logits(self, vector: Tensor) -> dict[Part, Tensor]:
        return {part: predict(self.model, vector, self.sets[part].x).logits for part in PARTS}

    def probe(self, vector: Tensor) -> float:
        def features(part: Part) -> Samples:
            return Samples(predict(self.model, vector, self.sets[part].x).features, self.sets[part].y)

        halves = features("forget_train"), features("retain_train")
        train = Samples(torch.cat([half.x for half in halves]), torch.cat([half.y for half in halves]))
        return linear_probe(train, features("forget_test"))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def trained(model: FlatModel, initial: Tensor, x: Tensor, y: Tensor) -> Tensor:
    model.load(initial)
    optimiser, order = torch.optim.SGD(model.trainable, lr=0.1, momentum=0.9), generator()
    for _ in range(12):
        for rows in torch.split(torch.randperm(len(y), generator=order), 64):
            optimiser.zero_grad()
            torch.autograd.backward(torch.nn.functional.cross_entropy(model(x[rows]).logits, y[rows]))
            optimiser.step()
    return model.vector()


@pytest.fixture(scope="module")
def digits() -> Digits:
    data = load_digits()
    x, y = torch.tensor(data.data, dtype=torch.float32) / 16, torch.tensor(data.target)
    order = torch.randperm(len(y), generator=generator(1))
    halves = {"train": order[:1257], "test": order[1257:]}
    sets: dict[Part, Samples] = {}
    for part in PARTS:
        side, half = part.split("_")
        rows = halves[half]
        rows = rows[(y[rows] == FORGOTTEN) == (side == "forget")]
        sets[part] = Samples(x[rows], y[rows])
    model = FlatModel(build_model(lambda: MLP(input_shape=(64,), heads=[10], hidden=[64]), seed=0))
    initial = model.vector()
    original = trained(model, initial, x[halves["train"]], y[halves["train"]])
    hidden = original.clone()
    model.spec.view(hidden, "head.bias")[FORGOTTEN] = -1e4
    return Digits(model, sets, initial, original, trained(model, initial, *sets["retain_train"]), hidden)


def test_the_metrics_are_right_on_a_forgotten_class(digits: Digits) -> None:
    targets = {part: digits.sets[part].y for part in PARTS}
    vectors = {"original": digits.original, "retrained": digits.retrained, "hidden": digits.hidden}
    logits = {name: digits.logits(vector) for name, vector in vectors.items()}
    random = digits.logits(digits.initial)
    numbers = {
        name: metrics(targets, made, original=logits["original"], reference=logits["retrained"], random=random)
        for name, made in logits.items()
    }
    original, retrained, hidden = numbers["original"], numbers["retrained"], numbers["hidden"]
    # the retrained model is the target, and not at 0 in everything
    assert retrained["forget_test_accuracy"] == 0.0
    assert retrained["retain_test_accuracy"] > 0.93
    assert 0.0 < retrained["mia_entropy"] < 0.3 < 0.6 < original["mia_entropy"]
    assert original["kl_forget"] > 3.0 > 0.1 > original["kl_retain"]
    assert original["zrf"] < retrained["zrf"]
    assert original["tow"] < 0.1
    assert original["h_mean"] == pytest.approx(0.0)
    # a model that merely cannot say it looks as if it had been retrained
    assert hidden["tow"] > 0.97
    assert hidden["h_mean"] > 0.93
    assert hidden["forget_test_accuracy"] == 0.0


def test_what_outputs_hide_the_probe_still_finds_but_so_it_does_without_ever_having_seen_it(digits: Digits) -> None:
    assert digits.probe(digits.hidden) == digits.probe(digits.original) > 0.85
    assert digits.probe(digits.retrained) == pytest.approx(digits.probe(digits.original), abs=0.2)


def test_relearning_takes_the_retrained_model_longer_than_a_hidden_class(digits: Digits) -> None:
    forget, test = digits.sets["forget_train"], digits.sets["forget_test"]
    before = accuracy(digits.logits(digits.original)["forget_test"], test.y)

    def relearn(vector: Tensor) -> Relearned:
        return relearn_steps(digits.model, vector, forget, test, original_accuracy=before, generator=generator())

    shut = digits.original.clone()
    digits.model.spec.view(shut, "head.bias")[FORGOTTEN] -= 10
    original, retrained, hidden = relearn(digits.original), relearn(digits.retrained), relearn(shut)
    assert (original.steps, original.reached, original.curve) == (0, True, (before,))
    assert 0 < hidden.steps < retrained.steps
    assert retrained.reached
    assert len(retrained.curve) == retrained.steps + 1
    assert retrained.curve[-1] >= 0.9 * before > retrained.curve[-2]
    assert anamnesis_index(hidden, retrained) == pytest.approx(hidden.steps / retrained.steps)


def test_relearning_leaves_the_model_alone_and_repeats(digits: Digits) -> None:
    forget, test = digits.sets["forget_train"], digits.sets["forget_test"]
    digits.model.load(digits.original)
    curves = [
        relearn_steps(
            digits.model,
            digits.retrained,
            forget,
            test,
            original_accuracy=1.0,
            generator=generator(),
            max_steps=3,
            tau=1,
        )
        for _ in range(2)
    ]
    assert curves[0] == curves[1]
    assert (curves[0].steps, curves[0].reached, len(curves[0].curve)) == (3, False, 4)
    assert math.isnan(anamnesis_index(curves[0], curves[1]))
    assert torch.equal(digits.model.vector(), digits.original)


def test_relearning_in_columns_that_exclude_the_class_never_brings_it_back(digits: Digits) -> None:
    retain, test = digits.sets["retain_train"], digits.sets["forget_test"]
    others = Training(columns=[c for c in range(10) if c != FORGOTTEN])
    closed = relearn_from_retain(
        digits.model, digits.original, retain, test, generator=generator(), epochs=1, training=others
    )
    assert closed == (0.0, 0.0)
    opened = relearn_from_retain(digits.model, digits.original, retain, test, generator=generator(), epochs=2)
    assert len(opened) == 3
    assert opened[0] == accuracy(digits.logits(digits.original)["forget_test"], test.y)


def test_retain_samples_bring_back_a_class_that_a_common_shift_had_hidden() -> None:
    # margin of class 1 at x = 1.5: 1.5 (w1 - w0) + b1 - b0, from -0.3. A step on class 0 at x = -1 adds 2 p lr to
    # w1 - w0 and takes as much from b1 - b0, p being the share of class 1 there: together it rises by p lr
    model = FlatModel(build_model(lambda: MLP(input_shape=(1,), heads=[2], hidden=[]), seed=0))
    vector = model.vector()
    model.spec.view(vector, "head.weight").copy_(torch.tensor([[0.0], [1.0]]))
    model.spec.view(vector, "head.bias").copy_(torch.tensor([1.8, 0.0]))
    retain = Samples(torch.full((8, 1), -1.0), torch.zeros(8, dtype=torch.long))
    test = Samples(torch.full((4, 1), 1.5), torch.ones(4, dtype=torch.long))
    curve = relearn_from_retain(
        model, vector, retain, test, generator=generator(), epochs=30, training=Training(learning_rate=1.0, momentum=0)
    )
    assert (curve[0], curve[-1]) == (0.0, 1.0)


def test_only_the_shots_drawn_are_trained_on(digits: Digits) -> None:
    forget, test = digits.sets["forget_train"], digits.sets["forget_test"]
    relearn = partial(relearn_steps, digits.model, digits.retrained, test=test, original_accuracy=1.0)
    first = int(torch.randperm(len(forget.y), generator=generator())[0])
    one = Samples(forget.x[first : first + 1], forget.y[first : first + 1])
    drawn = relearn(forget=forget, generator=generator(), shots=1)
    assert drawn == relearn(forget=one, generator=generator())
    assert drawn != relearn(forget=forget, generator=generator(), shots=2)


def test_columns_that_are_excluded_take_no_part_in_the_loss() -> None:
    # for the retain samples (x = 0) column 0 is sure among the first two, and hopeless against the third: to train it
    # against that one would lift it above column 1 for the test samples (x = 1) too
    model = FlatModel(build_model(lambda: MLP(input_shape=(1,), heads=[3], hidden=[]), seed=0))
    vector = model.vector()
    model.spec.view(vector, "head.weight").copy_(torch.tensor([[0.0], [6.0], [0.0]]))
    model.spec.view(vector, "head.bias").copy_(torch.tensor([5.0, 0.0, 100.0]))
    retain = Samples(torch.zeros(4, 1), torch.zeros(4, dtype=torch.long))
    test = Samples(torch.ones(4, 1), torch.ones(4, dtype=torch.long))
    training = Training(learning_rate=10.0, momentum=0, columns=[0, 1])
    curve = relearn_from_retain(model, vector, retain, test, generator=generator(), epochs=1, training=training)
    assert curve == (1.0, 1.0)


def test_the_probe_is_weighted_ridge_regression() -> None:
    draws = generator()
    y = torch.tensor([0] * 40 + [1] * 15 + [3] * 5)
    x = torch.randn(60, 6, generator=draws) + 0.7 * torch.randn(4, 6, generator=draws)[y]
    test = Samples(torch.randn(200, 6, generator=draws), torch.randint(0, 4, (200,), generator=draws))
    share = 1 / (3 * torch.bincount(y)[y].double())
    centred = x.double() - share @ x.double()
    alpha = 0.2 * float((share @ centred.square()).mean())
    one_hot = np.eye(4)[y.numpy()]
    theirs = Ridge(alpha=alpha, solver="cholesky").fit(x.double().numpy(), one_hot, sample_weight=share.numpy())
    predicted = theirs.predict(test.x.double().numpy()).argmax(1)
    for label in range(4):
        chosen = test.y == label
        expected = float((predicted[chosen.numpy()] == label).mean())
        assert linear_probe(Samples(x, y), Samples(test.x[chosen], test.y[chosen]), ridge=0.2) == expected
    assert set(predicted) == {0, 1, 3}


def test_the_probe_at_its_limits() -> None:
    y = torch.tensor([0, 0, 1])
    flat = Samples(torch.ones(3, 2), y)
    assert linear_probe(flat, flat) in (1 / 3, 2 / 3)
    assert math.isnan(linear_probe(flat, Samples(torch.ones(0, 2), y[:0])))
    with pytest.raises(ValueError, match="ridge=0"):
        linear_probe(flat, flat, ridge=0)


def test_bad_settings_are_named(digits: Digits) -> None:
    forget = digits.sets["forget_train"]
    none = Samples(forget.x[:0], forget.y[:0])
    relearn = partial(relearn_steps, digits.model, digits.original, original_accuracy=1.0, generator=generator())
    with pytest.raises(ValueError, match="tau=0"):
        relearn(forget, forget, tau=0.0)
    with pytest.raises(ValueError, match="shots=0"):
        relearn(forget, forget, shots=0)
    with pytest.raises(ValueError, match="max_steps=-1"):
        relearn(forget, forget, max_steps=-1)
    with pytest.raises(ValueError, match="0 forget"):
        relearn(none, forget)
    with pytest.raises(ValueError, match="epochs=0"):
        relearn_from_retain(digits.model, digits.original, forget, forget, generator=generator(), epochs=0)
    with pytest.raises(ValueError, match="learning_rate=0"):
        Training(learning_rate=0)
