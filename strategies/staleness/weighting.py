"""Late updates count less, the less the older they are: the weightings of asynchronous federated learning.

Nguyen et al., "Federated Learning with Buffered Asynchronous Aggregation", AISTATS 2022 (FedBuff); Xie et al.,
"Asynchronous Federated Optimization", 2019 (arXiv 1903.03934), section 5.2 (FedAsync's constant, polynomial and hinge);
exponential and sigmoid as used for comparison by Wang and Gao, AAAI 2025 (arXiv 2309.13536).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

from fedcl.contracts.strategy import Staleness, Update
from fedcl.contracts.view import ServerView
from strategies.staleness.rebase import rebased


def exponential(age: int, half_life: float) -> float:
    """Return 2^(-age / half_life)."""
    return float(2.0 ** (-age / half_life))


def sigmoid(age: int, slope: float, cutoff: float) -> float:
    """Return 1 / (1 + exp(slope (age - cutoff))): about 1 before ``cutoff``, about 0 beyond it."""
    exponent = slope * (age - cutoff)
    return 1.0 / (1.0 + math.exp(exponent)) if exponent < 700 else 0.0


def fedbuff(age: int) -> float:
    """Return 1 / sqrt(1 + age)."""
    return 1.0 / math.sqrt(1.0 + age)


def polynomial(age: int, power: float) -> float:
    """Return (1 + age)^(-power)."""
    return float((1.0 + age) ** -power)


def hinge(age: int, slope: float, cutoff: float) -> float:
    """Return 1 up to ``cutoff``, and 1 / (slope (age - cutoff) + 1) beyond it."""
    return 1.0 if age <= cutoff else 1.0 / (slope * (age - cutoff) + 1.0)


@dataclass(kw_only=True, eq=False, repr=False)
class Weighting(Staleness):
    """Scale late updates by a factor of their age, or drop them.

    Parameters
    ----------
    rule
        ``unweighted`` (factor 1), ``exponential``, ``sigmoid``, ``fedbuff``, or ``drop`` (factor 0).
    half_life
        Age in versions at which ``exponential`` halves an update.
    slope, cutoff
        Steepness and middle of ``sigmoid``.
    relative
        False: the change is scaled, so a round of nothing but late updates moves the model less, as FedBuff's
        1/K sum does. True: the weight within the round's mean is scaled, and a round of equally old updates moves the
        model as far as fresh ones would.
    """

    rule: Literal["unweighted", "exponential", "sigmoid", "fedbuff", "drop"] = "unweighted"
    half_life: float = 20.0
    slope: float = 0.25
    cutoff: float = 10.0
    relative: bool = False

    def factor(self, age: int) -> float:
        """Return what an update of this age is multiplied by; 1 for age 0."""
        if age == 0 or self.rule == "unweighted":
            return 1.0
        if self.rule == "exponential":
            return exponential(age, self.half_life)
        if self.rule == "sigmoid":
            return sigmoid(age, self.slope, self.cutoff)
        return fedbuff(age) if self.rule == "fedbuff" else 0.0

    def admit(self, updates: list[Update], view: ServerView) -> list[Update]:
        if self.rule == "drop":
            return [update for update in updates if update.age == 0]
        return [self._scaled(update, view) for update in updates]

    def _scaled(self, update: Update, view: ServerView) -> Update:
        factor = self.factor(update.age)
        if factor == 1.0:
            return update
        if self.relative:
            return replace(update, weight=update.weight * factor)
        return rebased(update, update.delta * factor, view)


@dataclass(kw_only=True, eq=False, repr=False)
class FedAsync(Staleness):
    """Mix a late client's *model* into the present one: w <- (1 - a) w + a w_i with a = alpha s(age).

    As a change of the present model that is a (w_i - w), which pulls back what happened since the client started; a
    weighted change a (w_i - w_base) does not. Fresh updates are the identity, as for every corrector: the published
    rule on them too is ``alpha=1`` here with a server learning rate of the published alpha. The client's proximal term
    is :class:`clients.strategies.fedprox.FedProx`'s business.

    Parameters
    ----------
    weighting
        s: ``constant`` 1, ``polynomial`` (1 + age)^(-power), or ``hinge`` 1 up to ``cutoff`` and then
        1 / (slope (age - cutoff) + 1).
    alpha
        Mixing weight of late models, in (0, 1].
    """

    weighting: Literal["constant", "polynomial", "hinge"] = "polynomial"
    alpha: float = 0.6
    power: float = 0.5
    slope: float = 10.0
    cutoff: float = 4.0

    def mixing(self, age: int) -> float:
        """Return alpha s(age) of a late model, and 1 for age 0."""
        if age == 0:
            return 1.0
        if self.weighting == "polynomial":
            return self.alpha * polynomial(age, self.power)
        return self.alpha * (hinge(age, self.slope, self.cutoff) if self.weighting == "hinge" else 1.0)

    def admit(self, updates: list[Update], view: ServerView) -> list[Update]:
        """Turn late models into steps of the present one towards them."""
        return [self._mixed(update, view) if update.age else update for update in updates]

    def _mixed(self, update: Update, view: ServerView) -> Update:
        way = update.model.double() - view.model_of(update.client).double()
        return rebased(update, way * self.mixing(update.age), view)
