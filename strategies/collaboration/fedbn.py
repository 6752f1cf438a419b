"""FedBN on the server: everything is averaged but the normalisation layers, which never leave their clients.

Li et al., "FedBN: Federated Learning on Non-IID Features via Local Batch Normalization", ICLR 2021, Algorithm 1.
"""

from __future__ import annotations

from fedcl.models.flat import Spec, TensorSpec
from strategies.collaboration.fedavg import FedAvg


class FedBN(FedAvg):
    """Average what no normalisation layer owns; the global model's layers stay as they were initialised.

    So the global model by itself predicts little of use: look at the personal accuracies. The client half is
    ``clients.strategies.fedbn.FedBN``.

    Raises
    ------
    ValueError
        If the model has no normalisation layer, or nothing else.
    """

    def setup(self, spec: Spec) -> None:
        shared = {self.shares(tensor) for tensor in spec}
        if shared != {True, False}:
            raise ValueError(
                "strategy.collaboration.server=FedBN: the model needs normalisation layers, and others: "
                "choose such a model, as model=resnet8 model.norm=batch"
            )

    def shares(self, tensor: TensorSpec) -> bool:
        """Whether ``tensor`` belongs to another layer than a normalisation."""
        return not tensor.norm
