"""SSD: dampen the parameters on which the forget set's loss hangs more than that of all data.

Foster, Schoepf, Brintrup, "Fast Machine Unlearning Without Retraining Through Selective Synaptic Dampening", AAAI 2024
(arXiv 2308.07707): with the importances I_F on the forget set and I_D on all data, every parameter with
I_F > alpha I_D is multiplied by beta = min(lambda I_D / I_F, 1). With ``loss=output_norm`` no label is needed: the
label-free variant of the same authors' code. Both importances are plain sums over clients.
"""

# P = parameter elements
from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from clients.unlearners.fisher import RESPONSE, STEP, Kind, Loss, Masses, Order, Settings, masses, response
from fedcl.contracts.requests import ForgetRequest
from fedcl.contracts.unlearner import Local, UnlearnContext, Unlearner, UnlearnView

if TYPE_CHECKING:
    from fedcl.contracts.strategy import Target

Threshold = Literal["relative", "quantile", "absolute"]


_ROUNDING = 1e-9  # a ratio that is at its bound but for rounding is not above it
_LEAST = 1e-300


class SSD(Unlearner):
    """Select parameters by the ratio of two importances, and dampen them; one message to each client a model.

    Parameters
    ----------
    threshold, alpha
        ``relative``: alpha, in (0, 1), is a share of |D| / |F|, which no ratio of per-sample importances can exceed.
        ``quantile``: alpha, in (0, 1), is the largest share of parameters to select. ``absolute``: the paper's alpha.
    dampening
        The paper's lambda.
    fisher
        ``per_sample``: sums over samples. ``official``: sums over batches of the squared gradient of their mean.
    order, batch_size
        Which samples meet in a batch, with ``official`` only: see `clients.unlearners.fisher.arranged`.
    loss
        ``cross_entropy``, or ``output_norm``, which needs no labels.
    forget_in_whole
        Whether I_D counts the forget set, as published; only then are relative thresholds bounded.
    """

    def __init__(
        self,
        *,
        threshold: Threshold = "relative",
        alpha: float = 0.3,
        dampening: float = 1.0,
        fisher: Kind = "per_sample",
        order: Order = "class_ordered",
        batch_size: int = 64,
        loss: Loss = "cross_entropy",
        forget_in_whole: bool = True,
    ) -> None:
        self.threshold, self.alpha, self.dampening = threshold, alpha, dampening
        self.importances = Settings(fisher, loss, order, batch_size, forget_in_whole)
        self._metrics: dict[str, float] = {}

    def local(self, ctx: UnlearnContext, step: str) -> Local:
        return response(ctx, self.importances) if step == STEP else super().local(ctx, step)

    def unlearn(
        self, requests: Sequence[ForgetRequest], models: Mapping[Target, Tensor], view: UnlearnView
    ) -> dict[Target, Tensor]:
        """Dampen each model by importances taken at it, now: none is stored from one request to the next."""
        everybody = dict.fromkeys([*view.clients, *view.owners])
        edited: dict[Target, Tensor] = {}
        shares = []
        for target, model in models.items():
            found = masses(view.ask(STEP, dict.fromkeys(everybody, model), RESPONSE))
            if found is None:
                continue
            selected = self.select(found)
            edited[target] = dampened(model, found, selected, self.dampening)
            shares.append(float(selected.double().mean()))
            self._metrics = {
                "selected": sum(shares) / len(shares),
                "threshold": self.cut(found),
                "bound": found.whole_samples / found.forget_samples,
            }
        if not edited:
            self._metrics = {"selected": 0.0}
        return edited

    def cut(self, found: Masses) -> float:
        """Return the ratio I_F / I_D above which a parameter is selected: the paper's alpha."""
        if self.threshold == "absolute":
            return self.alpha
        if self.threshold == "relative":
            return self.alpha * found.whole_samples / found.forget_samples
        ratio = ratios(found)
        return float(ratio.kthvalue(len(ratio) - int(self.alpha * len(ratio))).values)

    def select(self, found: Masses) -> Tensor:
        """Return which parameters are dampened, bool (P,)."""
        return ratios(found) > self.cut(found) * (1.0 + _ROUNDING)

    def metrics(self) -> dict[str, float]:
        """Return the selected share of the parameters, alpha as the paper has it, and |D| / |F|, of the last model."""
        return dict(self._metrics)


def ratios(found: Masses) -> Tensor:
    """Return I_F / I_D (P,); 0 where nothing hangs on a parameter."""
    return found.forget / found.whole.clamp_min(_LEAST)


def dampened(model: Tensor, found: Masses, selected: Tensor, dampening: float) -> Tensor:
    """Return the vector ``model`` (all elements) with its ``selected`` parameters multiplied by beta; buffers stay."""
    beta = (dampening * found.whole / found.forget.clamp_min(_LEAST)).clamp_max(1.0)
    factor = torch.where(selected, beta, 1.0)
    edited = model.clone()
    edited[: len(factor)] = (model[: len(factor)].double() * factor.to(model.device)).float()
    return edited
