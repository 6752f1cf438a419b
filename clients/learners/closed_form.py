"""What closed-form heads share: features come from the model, the head from sums over all clients' samples.

As :meth:`fedcl.contracts.learner.Plugin.solve` says, clients respond with plain sums in float64, and the server adds
them up and writes the head. It is the head that a single client with all the data would have.
"""

# N = samples, F = features, C = logit columns
from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedcl.contracts.fields import Form, TensorField
from fedcl.contracts.learner import Context, Phase, Plugin
from fedcl.models.flat import FlatModel

CLASS_SUMS: Form = {  # what `class_sums` returns
    "features": TensorField(("columns", "features"), "float64"),
    "counts": TensorField(("columns",), "float64", low=0.0, counts=True),
}
Train = Literal["first_task", "none", "all"]


class ClosedForm(Plugin):
    """Train the network by the usual loop in the tasks that ``train`` names; a subclass solves for the head.

    With ``first_task`` a client trains in its first task only, so that sums over tasks are of one feature map; with
    ``all`` the features of earlier tasks drift away from their sums.
    """

    phase: ClassVar[Phase] = Phase.BOOKKEEPING
    key: ClassVar[str]  # of the configuration

    def __init__(self, *, train: Train = "first_task") -> None:
        self.train = train

    def indices(self, ctx: Context, order: Tensor) -> Tensor:
        """Return the epoch's samples, or none if the task is not trained."""
        trains = self.train == "all" or (self.train == "first_task" and len(ctx.task_columns) == 1)
        return order if trains else order[:0]

    def check(self, model: FlatModel) -> None:
        """Reject heads that are not linear with a bias, which the solution is written to."""
        if not all(isinstance(head, nn.Linear) and head.bias is not None for head in heads(model)):
            raise ValueError(f"learner.{self.key}: needs linear heads; set model.head=linear, random or unit")


def heads(model: FlatModel) -> list[nn.Module]:
    """Return the model's heads, in the order of their columns."""
    if "head" in model.module._modules:
        return [model.module.get_submodule("head")]
    return list(model.module.get_submodule("heads").children())


@torch.no_grad()
def write_heads(model: FlatModel, weight_CF: Tensor, bias_C: Tensor, known_C: Tensor) -> None:
    """Write the rows of columns that are ``known_C`` (bool) into the heads; the others stay as they are."""
    start = 0
    for head in heads(model):
        assert isinstance(head, nn.Linear)
        rows = slice(start, start + head.out_features)
        known = known_C[rows].to(head.weight.device)
        fresh = weight_CF[rows].to(head.weight), bias_C[rows].to(head.bias)
        head.weight.copy_(torch.where(known[:, None], fresh[0], head.weight))
        head.bias.copy_(torch.where(known, fresh[1], head.bias))
        start = rows.stop


def features(ctx: Context) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the features (N, F), float64, and columns (N,) of the client's samples, batch by batch, in eval mode."""
    yield from features_of(ctx.model, ctx.data.x, ctx.data.y)


@torch.no_grad()
def features_of(model: FlatModel, x: Tensor, y: Tensor, batch_size: int = 1024) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the features (N, F), float64, of ``x`` (N, ...) and their columns (N,), batch by batch, in eval mode."""
    model.eval()
    for rows, columns in zip(torch.split(x, batch_size), torch.split(y, batch_size), strict=True):
        yield model(rows).features.double(), columns


def class_sums(ctx: Context, *, unit: bool = False) -> dict[str, Tensor]:
    """Return `CLASS_SUMS`: of each column's samples the sum of the features (C, F) and the count (C,), on the CPU.

    With ``unit`` features are first scaled to length 1. The client must hold samples of the task.
    """
    total: Tensor | None = None
    for rows, y in features(ctx):
        if total is None:
            total, counts = rows.new_zeros(ctx.num_columns, rows.shape[1]), rows.new_zeros(ctx.num_columns)
        total.index_add_(0, y, F.normalize(rows, dim=1) if unit else rows)
        counts += torch.bincount(y, minlength=ctx.num_columns)
    assert total is not None
    return {"features": total.cpu(), "counts": counts.cpu()}
