"""UER: unbiased experience replay.

Lin et al., "UER: A Heuristic Bias Addressing Approach for Online Continual Learning", ACM Multimedia 2023 (arXiv
2309.04081). A logit is ``w_c . z = |w_c| |z| cos(theta_c)``; the bias towards new classes lies in the norms. Incoming
samples learn by the angle alone, ``CE(gamma cos(theta))``, replayed samples by the whole logit, ``CE(w . z)``.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clients.learners.er import ER
from clients.learners.er_ace import halves, joint_cross_entropy
from fedcl.client.loop import masked_cross_entropy
from fedcl.client.policies import Policy
from fedcl.contracts.learner import Batch, Context
from fedcl.models.networks import Output

# B = batch, C = logit columns, F = features


class UER(ER):
    """Replay as :class:`~clients.learners.er.ER` does, with the loss above; predictions are by the whole logit.

    ``scale`` is gamma. With a budget of 0 the loss is plain cross-entropy.
    """

    key = "learner.uer"

    def __init__(
        self,
        *,
        budget: int | str = 200,
        replay_size: int | None = None,
        policy: Policy = "reservoir",
        scale: float = 10.0,
    ) -> None:
        super().__init__(budget=budget, replay_size=replay_size, policy=policy)
        self.scale = scale

    def objective(self, ctx: Context, batch: Batch, out: Output) -> Tensor:
        if not self._buffer.enabled:
            return masked_cross_entropy(out, batch)
        (new, new_out), (past, past_out) = halves(batch, out, self._incoming)
        angles_BC = cosines(new_out.features, head_weights(ctx.model.module))
        return joint_cross_entropy((new, Output(self.scale * angles_BC, new_out.features)), (past, past_out))


def head_weights(network: nn.Module) -> Tensor:
    """Return the weights (C, F) of a network's head, or of all its heads one below the other."""
    heads = cast(list[nn.Linear], list(network.heads) if hasattr(network, "heads") else [network.head])  # type: ignore[arg-type]
    return torch.cat([head.weight for head in heads])


def cosines(features_BF: Tensor, weights_CF: Tensor) -> Tensor:
    """Return the cosine of the angle between each sample's features and each column's weights, (B, C)."""
    return F.normalize(features_BF, dim=1) @ F.normalize(weights_CF, dim=1).T
