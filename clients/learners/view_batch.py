"""View-batch: each sample is seen rarely, but in several views at once.

Kang et al., "Do Your Best and Get Enough Rest for Continual Learning", CVPR 2025 (arXiv 2503.18371), after its
published code: an index permutation is drawn for a block of R epochs; each epoch takes its next share of 1/R, every
index R times in a row. An epoch costs what it did, a sample comes back R times as late. Its first view is the sample as
it is, the others are augmented, and a divergence pulls the model's outputs on them towards its output on the first.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from fedcl.base.randomness import torch_generator
from fedcl.contracts.learner import Batch, Context, Phase, Plugin, State, TaskData
from fedcl.contracts.requests import ErasureOutcome, ForgetRequest
from fedcl.models.networks import Output

# N = samples of the task, B = batch, V = augmented views, H, W = height, width


class ViewBatch(Plugin):
    """Train on ``repeats`` views of 1/``repeats`` of the samples in each epoch, and let the views agree.

    Epochs are counted over the client's local rounds of a task. With ``repeats`` 1 nothing is computed.

    Parameters
    ----------
    repeats
        R, views of a sample.
    weight
        Weight of the divergence KL(first view || other view), the mean over the other views; 0 turns it off.
    start
        Epochs of the task after which the divergence is used.
    shift
        Pixels by which an image is moved at most in each direction, zeros coming in; drawn for each view.
    flip
        Whether an image is mirrored left to right with probability 1/2.
    noise
        Standard deviation of the Gaussian noise added to each input, as the model sees it.
    """

    phase = Phase.DATA

    def __init__(
        self, *, repeats: int = 4, weight: float = 1.0, start: int = 0, shift: int = 2, flip: bool = False,
        noise: float = 0.1,
    ) -> None:  # fmt: skip
        self.repeats = repeats
        self.weight = weight
        self.start = start
        self.shift = shift
        self.flip = flip
        self.noise = noise
        self._epochs = 0
        self._first: Tensor | None = None
        self._others: Tensor | None = None

    def before_task(self, ctx: Context) -> None:
        self._epochs = 0

    def indices(self, ctx: Context, order: Tensor) -> Tensor:
        """Return this epoch's share of the block's permutation, each position ``repeats`` times in a row."""
        if self.repeats == 1:
            return order
        shares = min(self.repeats, len(order))
        block, share = divmod(self._epochs, shares)
        generator = torch_generator(ctx.seed, ctx.client, "views", ctx.task.id, block)
        self._epochs += 1
        return torch.randperm(len(order), generator=generator)[share::shares].repeat_interleave(self.repeats)

    def before_step(self, ctx: Context, batch: Batch) -> Batch:
        """Augment all views of a sample except its first in the batch."""
        self._first = self._others = None
        if self.repeats == 1:
            return batch
        assert ctx.rows is not None
        first = first_views(ctx.rows)
        others = torch.nonzero(first != torch.arange(len(first), device=first.device)).squeeze(1)
        if not len(others):
            return batch
        self._first, self._others = first[others], others
        x = batch.x.clone()
        x[others] = self._augment(x[others], ctx.rng("views"))
        return batch._replace(x=x)

    def loss(self, ctx: Context, batch: Batch, out: Output) -> Tensor | None:
        """Return the divergence between views; None if the batch has no second view."""
        if not self.weight or self._first is None or self._others is None or self._epochs <= self.start:
            return None
        logits = out.logits if ctx.mask is None else out.logits[:, ctx.mask]
        return self.weight * views_divergence(logits[self._first], logits[self._others])

    def _augment(self, x: Tensor, generator: torch.Generator) -> Tensor:
        if not x.is_floating_point():
            return x  # tokens have no views
        if x.ndim == 4:
            x = shifted(x, self.shift, generator) if self.shift else x
            x = mirrored(x, generator) if self.flip else x
        return x + self.noise * torch.randn(x.shape, generator=generator).to(x.device) if self.noise else x

    def forget(self, ctx: Context, request: ForgetRequest, removed: TaskData) -> ErasureOutcome:
        """Keep the count, which does not depend on samples."""
        return ErasureOutcome(type(self).__name__, "not applicable", "counts epochs, and nothing else")

    def state(self) -> State:
        return {"epochs": self._epochs} if self._epochs else {}

    def load(self, state: State) -> None:
        self._epochs = state.get("epochs", 0)


def first_views(rows: Tensor) -> Tensor:
    """Return, for each place of ``rows`` (B,), where its run of equal neighbours begins."""
    places = torch.arange(len(rows), device=rows.device)
    begins = torch.ones_like(rows, dtype=torch.bool)
    begins[1:] = rows[1:] != rows[:-1]
    return torch.where(begins, places, 0).cummax(0).values


def views_divergence(first_VC: Tensor, other_VC: Tensor) -> Tensor:
    """Return KL(softmax(first) || softmax(other)), the mean over pairs of logits; no gradient flows into the first."""
    target = F.log_softmax(first_VC.detach(), dim=1)
    return F.kl_div(F.log_softmax(other_VC, dim=1), target, reduction="batchmean", log_target=True)


def shifted(x: Tensor, most: int, generator: torch.Generator) -> Tensor:
    """Return images (B, C, H, W), each moved by its own draw of up to ``most`` pixels both ways; zeros come in."""
    height, width = x.shape[-2:]
    moves = torch.randint(2 * most + 1, (2, len(x), 1), generator=generator).to(x.device)
    rows = (torch.arange(height, device=x.device) + moves[0])[:, None, :, None]
    columns = (torch.arange(width, device=x.device) + moves[1])[:, None, None, :]
    images = torch.arange(len(x), device=x.device)[:, None, None, None]
    channels = torch.arange(x.shape[1], device=x.device)[None, :, None, None]
    return F.pad(x, (most, most, most, most))[images, channels, rows, columns]


def mirrored(x: Tensor, generator: torch.Generator) -> Tensor:
    """Return images (B, C, H, W), each mirrored left to right with probability 1/2."""
    chosen = torch.rand(len(x), generator=generator).to(x.device) < 0.5
    return torch.where(chosen[:, None, None, None], x.flip(-1), x)
