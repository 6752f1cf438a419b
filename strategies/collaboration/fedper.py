"""FedPer and FedRep on the server: the body is averaged, heads never leave their clients.

Arivazhagan et al., "Federated Learning with Personalization Layers", arXiv 1912.00818, Algorithm 1; Collins et al.,
"Exploiting Shared Representations for Personalized Federated Learning", ICML 2021, Algorithm 1.
"""

from __future__ import annotations

from fedcl.contracts.strategy import Collaboration
from fedcl.models.flat import Spec, TensorSpec, is_head


class FedPer(Collaboration):
    """Average the body, weighted by samples. The global model keeps the head it was initialised with.

    So the global model by itself predicts nothing of use: look at the personal accuracies.

    Raises
    ------
    ValueError
        If the model has no head, or nothing else.
    """

    def setup(self, spec: Spec) -> None:
        shared = {self.shares(tensor) for tensor in spec}
        if shared != {True, False}:
            raise ValueError(
                "strategy.collaboration.server=FedPer: the model needs tensors head.* or heads.<k>.*, and others"
            )

    def shares(self, tensor: TensorSpec) -> bool:
        return not is_head(tensor)
