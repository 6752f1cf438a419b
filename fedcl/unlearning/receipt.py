"""What serving requests did: what is measured of it, and all that a certificate says."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from fedcl.contracts.requests import ErasureOutcome, ForgetRequest, Forgotten
from fedcl.contracts.strategy import Target


class Panel(Protocol):
    """Measures what serving requests did; a simulation has one, which sees all data."""

    def measure(
        self,
        requests: Sequence[ForgetRequest],
        before: Mapping[Target, Tensor],
        after: Mapping[Target, Tensor],
        reference: Mapping[Target, Tensor] | None,
        seen: Sequence[int],
        earlier: Forgotten,
        server_round: int,
    ) -> dict[str, float]:
        """Return measurements by name; what was forgotten ``earlier`` belongs to none of the sets."""
        ...

    def revival(self, requests: Sequence[ForgetRequest], model: Tensor, seen: Sequence[int]) -> dict[str, float]:
        """Return the accuracy of ``model`` (P,) on what each of ``requests`` wanted forgotten, by request id."""
        ...


@dataclass
class Receipt:
    """What serving some requests together did: all a certificate says, but for the chain.

    ``first`` is the place of the first of them among all that were ever served, from 1.
    """

    first: int
    requests: list[ForgetRequest]
    server_round: int
    promise: str
    before: str
    after: str
    model_epoch: int
    outcomes: list[ErasureOutcome]
    measurements: dict[str, float]
    cost: dict[str, float]


def model_digest(models: Mapping[Target, Tensor]) -> str:
    """Return the SHA-256 of models, target by target: what a certificate names a state of the run by."""
    digest = hashlib.sha256()
    for target in sorted(models):
        digest.update(target.encode() + b"\0" + models[target].contiguous().numpy().tobytes())
    return digest.hexdigest()
