"""NMC: the nearest class mean predicts.

Mensink et al., "Distance-Based Image Classification: Generalizing to New Classes at Near-Zero Cost", TPAMI 2013; Janson
et al., "A Simple Baseline that Questions the Use of Pretrained-Models in Continual Learning", 2022: features of length
1, each class the mean of its samples', a sample goes to the class whose mean is nearest.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from fedcl.client.plugin import Context, Phase, Plugin, State

# B = batch, N = samples, C = logit columns, F = features
_FAR = -1e9  # of a column without a mean: below every distance, above what a mask shuts out


class NearestClassMean(Plugin):
    """Predict with the client's class means; training is untouched.

    Means of a finished task are taken once, under the global model it ended with; those of the present task anew,
    under the present weights. What is kept are sums and counts, so that means over tasks are exact.
    """

    phase = Phase.BOOKKEEPING

    def __init__(self) -> None:
        self._sums_CF: Tensor | None = None
        self._counts_C: Tensor | None = None
        self._finished: list[int] = []
        self._present: tuple[int, Tensor, Tensor] | None = None

    def after_task(self, ctx: Context) -> None:
        """Add the task's features to the sums of their classes."""
        if ctx.task.id in self._finished:
            return
        self._sums_CF, self._counts_C = self._with(class_sums(ctx))
        self._finished.append(ctx.task.id)

    def predict(self, ctx: Context, x: Tensor) -> Tensor:
        """Return minus the distance of each sample's features to each mean, (B, C)."""
        sums_CF, counts_C = self._all(ctx)
        with torch.no_grad():
            features = F.normalize(ctx.model(x).features, dim=1).double()
        return mean_logits(features, sums_CF, counts_C)

    def _all(self, ctx: Context) -> tuple[Tensor, Tensor]:
        if ctx.task.id in self._finished and self._sums_CF is not None and self._counts_C is not None:
            return self._sums_CF, self._counts_C
        if self._present is None or self._present[0] != ctx.step:  # the weights have moved since
            self._present = (ctx.step, *class_sums(ctx))
        return self._with(self._present[1:])

    def _with(self, more: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        if self._sums_CF is None or self._counts_C is None:
            return more
        return self._sums_CF + more[0], self._counts_C + more[1]

    def state(self) -> State:
        """Return sums (C, F), counts (C,), and which tasks are in them."""
        if self._sums_CF is None:
            return {}
        return {"sums": self._sums_CF, "counts": self._counts_C, "finished": self._finished}

    def load(self, state: State) -> None:
        """Restore them."""
        self._sums_CF, self._counts_C = state.get("sums"), state.get("counts")
        self._finished = list(state.get("finished", []))


@torch.no_grad()
def class_sums(ctx: Context) -> tuple[Tensor, Tensor]:
    """Return the sum of the unit features of each column's samples, float64 (C, F), and their counts, float64 (C,)."""
    ctx.model.eval()
    features = torch.cat([ctx.model(x).features for x in torch.split(ctx.data.x, 1024)])
    features_NF = F.normalize(features, dim=1).double()
    sums = features_NF.new_zeros(ctx.num_columns, features_NF.shape[1])
    counts = features_NF.new_zeros(ctx.num_columns)
    sums.index_add_(0, ctx.data.y, features_NF)
    counts.index_add_(0, ctx.data.y, features_NF.new_ones(len(features_NF)))
    return sums, counts


def mean_logits(features_BF: Tensor, sums_CF: Tensor, counts_C: Tensor) -> Tensor:
    """Return minus the distance to each mean (B, C), and -1e9 where a column has no samples."""
    means_CF = sums_CF / counts_C.clamp_min(1.0)[:, None]
    return (-torch.cdist(features_BF, means_CF)).masked_fill(counts_C == 0, _FAR)
