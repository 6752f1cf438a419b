"""FedAvg: the weighted mean of the clients' changes.

McMahan et al., "Communication-Efficient Learning of Deep Networks from Decentralized Data", AISTATS 2017, Algorithm 1.
"""

from __future__ import annotations

from typing import Literal

from fedcl.contracts.strategy import Collaboration, Update


class FedAvg(Collaboration):
    """Average the clients' changes, weighted by their number of samples or uniformly."""

    def __init__(self, *, weighting: Literal["num_examples", "uniform"] = "num_examples") -> None:
        self.weighting = weighting

    def weight(self, update: Update) -> float:
        """Return the weight of a change. A uniform mean still honours a staleness weight relative to the samples."""
        return update.weight / update.num_examples if self.weighting == "uniform" else update.weight
