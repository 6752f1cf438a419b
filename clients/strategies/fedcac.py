"""FedCAC's client half: which parameters are critical, one bit each, if the server does not compute it.

Wu et al., "Bold but Cautious: Unlocking the Potential of Personalized Federated Learning through Cautiously Aggressive
Collaboration", ICCV 2023 (arXiv 2309.11103), with the details of its author's code (FLAIR-Community/Fling).
"""

# P = length of the flat vector, B = batch or ceil(P / 8) bytes, C = logit columns
from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor

from clients.strategies.local_sgd import standing_at
from fedcl.client.loop import masked_cross_entropy
from fedcl.contracts.fields import TensorField
from fedcl.contracts.learner import Batch, Context, Payload, Phase, Plugin, State
from fedcl.models.masks import critical_mask, pack_bits, trained_parameters
from fedcl.models.networks import Output

CRITICAL = Payload(
    "critical", "up", TensorField(("bitmask",), "uint8"), reduction="stack"
)  # as strategies.collaboration.fedcac declares it


class CriticalMask(Plugin):
    """Upload the mask of critical parameters as uint8 (B,), from the model received and the model trained.

    With ``masks="server"`` nothing is sent. Both parameters are those of the server half.
    """

    phase: ClassVar[Phase] = Phase.BOOKKEEPING  # after those that still change the weights

    def __init__(self, *, tau: float = 0.5, masks: Literal["server", "client"] = "server") -> None:
        self.tau = tau
        self.masks = masks
        if masks == "client":
            self.payloads = (CRITICAL,)  # type: ignore[misc]

    def after_round(self, ctx: Context) -> dict[str, Tensor]:
        """Return the mask, without the heads of other tasks, which were not trained."""
        if self.masks == "server":
            return {}
        tensors = trained_parameters(ctx.model.spec, ctx.task.head)
        return {CRITICAL.name: pack_bits(critical_mask(ctx.received, ctx.model.vector(), tensors, self.tau))}


class BalancedCriticalMask(CriticalMask):
    """Learn classes independently of their local frequency, and predict with a mean of trained and received weights.

    The loss is the cross-entropy of z + log(n_c + ``smoothing``), with z the logits and n_c the client's samples of
    class c in the task; predictions are the largest of the same sum, with n_c over all tasks it has trained. So weights
    of clients with different mixtures agree and may be averaged (balanced softmax, Ren et al., NeurIPS 2020; logit
    adjustment, Menon et al., ICLR 2021). A client that has trained predicts with (1 - ``mix``) times the weights it
    trained last plus ``mix`` times those it receives. An extension of FedCAC, not part of it; neither counts nor the
    weights kept travel.
    """

    def __init__(
        self,
        *,
        smoothing: float = 1.0,
        mix: float = 0.5,
        tau: float = 0.5,
        masks: Literal["server", "client"] = "server",
    ) -> None:
        super().__init__(tau=tau, masks=masks)
        self.smoothing = smoothing
        self.mix = mix
        self._counts: dict[str, Tensor] = {}
        self._trained: Tensor | None = None
        self._prior: Tensor | None = None

    def state(self) -> State:
        """Return the samples of each class, int64 (C,), by task, and the weights trained last (P,)."""
        return {"counts": dict(self._counts), **({} if self._trained is None else {"trained": self._trained})}

    def load(self, state: State) -> None:
        self._counts = dict(state.get("counts", {}))
        self._trained = state.get("trained")

    def before_round(self, ctx: Context) -> None:
        """Count the samples of the task; from here on the current weights are the client's own."""
        counts = torch.bincount(ctx.data.y, minlength=ctx.num_columns)
        self._counts[str(ctx.task.id)] = counts
        self._prior = (counts + self.smoothing).log()

    def objective(self, ctx: Context, batch: Batch, out: Output) -> Tensor:
        """Return the mean cross-entropy of the adjusted logits over the allowed columns."""
        if self._prior is None:
            raise RuntimeError("BalancedCriticalMask: a step was taken in a local round that never began")
        return masked_cross_entropy(Output(out.logits + self._prior, out.features), batch)

    def after_round(self, ctx: Context) -> dict[str, Tensor]:
        """Keep the trained weights, and return the mask as in FedCAC."""
        self._trained = ctx.model.vector()
        return super().after_round(ctx)

    def predict(self, ctx: Context, x: Tensor) -> Tensor:
        """Return the adjusted logits (B, C), or plain ones for a client that has never trained."""
        if not self._counts:
            return ctx.model(x).logits
        counts = torch.stack(list(self._counts.values())).sum(0)
        prior = (counts + self.smoothing).log()
        if self._trained is None or self._prior is not None:
            return ctx.model(x).logits + prior
        mixed = torch.lerp(self._trained.to(ctx.device), ctx.model.flat, self.mix)
        with torch.no_grad(), standing_at(ctx.model, mixed):
            return ctx.model(x).logits + prior
