"""RanPAC: a ridge classifier on random features, in closed form.

McDonnell et al., "RanPAC: Random Projections and Pre-trained Models for Continual Learning", NeurIPS 2023: with
features h = relu(z M) of a fixed random M, G = sum h h^T and C = sum h y^T give the head (G + lambda I)^-1 C.
The random features are the model's own, ``model.head=random``; with ``model.head=linear`` it is ridge regression on the
features themselves.
"""

# C = logit columns, F = features that the heads read
from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from clients.learners.closed_form import ClosedForm, Train, features, write_heads
from fedcl.base.linalg import definite
from fedcl.contracts.fields import Form, TensorField
from fedcl.contracts.learner import Context
from fedcl.models.flat import FlatModel

GRAM = "gram"  # the query whose responses the server adds up
GRAM_SUMS: Form = {  # what `gram_sums` returns
    "gram": TensorField(("features", "features"), "float64"),
    "cross": TensorField(("features", "columns"), "float64"),
    "counts": TensorField(("columns",), "float64", low=0.0, counts=True),
}


class RanPAC(ClosedForm):
    """Solve the ridge regression from features to one-hot targets over all clients' samples.

    Parameters
    ----------
    ridge
        lambda, relative to the mean of G's diagonal, so that it means the same for any number of samples and scale.
    train
        When the network itself is trained: see `ClosedForm`.
    """

    queries: ClassVar[tuple[str, ...]] = (GRAM,)
    sums: ClassVar[Mapping[str, Form]] = {GRAM: GRAM_SUMS}
    key: ClassVar[str] = "ranpac"

    def __init__(self, *, ridge: float = 1e-3, train: Train = "first_task") -> None:
        super().__init__(train=train)
        self.ridge = ridge

    def respond(self, ctx: Context, name: str, request: dict[str, Tensor]) -> dict[str, Tensor]:
        return gram_sums(features(ctx), ctx.num_columns)

    def solve(self, model: FlatModel, sums: dict[str, Tensor]) -> None:
        gram = sums["gram"]
        scale = gram.diagonal().mean().clamp_min(torch.finfo(gram.dtype).tiny)
        regular = gram + self.ridge * scale * torch.eye(len(gram), dtype=gram.dtype)
        weight_FC, info = torch.linalg.solve_ex(regular, sums["cross"])
        if int(info) or not bool(torch.isfinite(weight_FC).all()):  # what some client sent is no Gram matrix
            weight_FC = torch.linalg.solve(definite(regular), sums["cross"])
        write_heads(model, weight_FC.T, torch.zeros(weight_FC.shape[1]), sums["counts"] > 0)


def gram_sums(batches: Iterable[tuple[Tensor, Tensor]], num_columns: int) -> dict[str, Tensor]:
    """Return G (F, F), the sums of features by column (F, C), and the columns' counts (C,), float64, on the CPU.

    ``batches`` are features (N, F), float64, and columns (N,): at least one.
    """
    gram: Tensor | None = None
    for rows, y in batches:
        if gram is None:
            gram = rows.new_zeros(rows.shape[1], rows.shape[1])
            cross, counts = rows.new_zeros(rows.shape[1], num_columns), rows.new_zeros(num_columns)
        gram += rows.T @ rows
        one_hot = F.one_hot(y, num_columns).double()
        cross += rows.T @ one_hot
        counts += one_hot.sum(0)
    assert gram is not None  # who has no samples has nothing to add
    return {"gram": gram.cpu(), "cross": cross.cpu(), "counts": counts.cpu()}
