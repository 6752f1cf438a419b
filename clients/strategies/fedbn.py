"""FedBN's client half: normalisation layers stay with the client.

Li et al., "FedBN: Federated Learning on Non-IID Features via Local Batch Normalization", ICLR 2021, Algorithm 1.
"""

from __future__ import annotations

from typing import ClassVar

from clients.strategies.kept import Kept
from fedcl.models.flat import TensorSpec


class FedBN(Kept):
    """Keep scale, shift and running statistics of every normalisation layer."""

    name: ClassVar[str] = "norms"

    def keeps(self, tensor: TensorSpec) -> bool:
        return tensor.norm
