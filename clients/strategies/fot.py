"""FOT's client half: summarises each layer's inputs in one pass over the client's samples of the task.

Bakman et al., ICLR 2024 (global principal subspace extraction). The server half is ``strategies/projection/fot.py``.
"""

# M = columns of the input matrix A (samples, or patches of samples), D = inputs of a layer, K = rank of its basis
# Q = columns of a sketch, B = batch, C, H, W = channels, height, width
from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedcl.base.linalg import project_out, random_signs
from fedcl.contracts.learner import Context, Phase, Plugin
from fedcl.models.networks import RandomLayer

_CHUNK = 4096  # columns of A sketched at a time: bounds the random matrix, which is as long as A


def layer_rows(layer: nn.Linear | nn.Conv2d, x: Tensor) -> Tensor:
    """Return the columns of a layer's input matrix as rows (M, D): inputs of a linear layer, patches of a convolution.

    Patches are those that the layer's kernel reads, with its stride, padding and dilation: all samples, all positions.
    """
    if isinstance(layer, nn.Linear):
        return x.reshape(-1, layer.in_features)
    padded = F.pad(x, _pads(layer), mode="constant" if layer.padding_mode == "zeros" else layer.padding_mode)
    kernel = (layer.kernel_size[0], layer.kernel_size[1])
    patches_BDL = F.unfold(padded, kernel, dilation=layer.dilation, stride=layer.stride)
    return patches_BDL.transpose(1, 2).reshape(-1, patches_BDL.shape[1])


def _pads(layer: nn.Conv2d) -> list[int]:
    """Return the padding as ``F.pad`` takes it: (left, right, top, bottom)."""
    if layer.padding == "valid":
        return [0, 0, 0, 0]
    if isinstance(layer.padding, str):
        totals = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
        return [part for total in reversed(totals) for part in (total // 2, total - total // 2)]
    return [pad for pad in reversed(layer.padding) for _ in range(2)]


class GramSum:
    """The Gram matrix A A^T (D, D) of all inputs of a layer, batch by batch."""

    def __init__(self, inputs: int) -> None:
        self._gram_DD = torch.zeros(inputs, inputs, dtype=torch.float64)

    def add(self, rows_MD: Tensor) -> None:
        self._gram_DD += (rows_MD.T @ rows_MD).double().cpu()

    def tensors(self, layer: str) -> dict[str, Tensor]:
        """Return ``<layer>/gram``, float32 (D, D)."""
        return {f"{layer}/gram": self._gram_DD.float()}


class Sketch:
    """A sketch R G (D, Q) of the residual inputs R = A - U U^T A, with the energies of R and A, batch by batch.

    Each batch uses new rows of the random matrix G, which only this client knows.
    """

    def __init__(self, basis_DK: Tensor, width: int, draw: Callable[[int, int], Tensor]) -> None:
        self._basis_DK, self._width, self._draw = basis_DK, width, draw
        self._sketch_DQ = torch.zeros(basis_DK.shape[0], width, dtype=torch.float64)
        self._energy = torch.zeros(1, dtype=torch.float64)
        self._residual = torch.zeros(1, dtype=torch.float64)

    def add(self, rows_MD: Tensor) -> None:
        for rows in torch.split(rows_MD, _CHUNK):
            residual = project_out(rows, self._basis_DK)
            self._energy += rows.double().square().sum().cpu()
            self._residual += residual.double().square().sum().cpu()
            random_MQ = self._draw(len(rows), self._width).to(rows.device)
            self._sketch_DQ += (residual.T @ random_MQ).double().cpu()

    def tensors(self, layer: str) -> dict[str, Tensor]:
        """Return ``<layer>/sketch``, float32 (D, Q), and the squared norms ``<layer>/energy``, ``<layer>/residual``."""
        return {
            f"{layer}/sketch": self._sketch_DQ.float(),
            f"{layer}/energy": self._energy,
            f"{layer}/residual": self._residual,
        }


class Range:
    """The residual's Gram matrix times random signs, R R^T Omega (D, Q), with the energies of R and A, batch by batch.

    All clients of a query use the same Omega, so that the sum over clients is that of the pooled samples.
    """

    def __init__(self, basis_DK: Tensor, signs_DQ: Tensor) -> None:
        self._basis_DK, self._signs_DQ = basis_DK, signs_DQ
        self._range_DQ = torch.zeros(signs_DQ.shape, dtype=torch.float64)
        self._energy = torch.zeros(1, dtype=torch.float64)
        self._residual = torch.zeros(1, dtype=torch.float64)

    def add(self, rows_MD: Tensor) -> None:
        residual = project_out(rows_MD, self._basis_DK)
        self._energy += rows_MD.double().square().sum().cpu()
        self._residual += residual.double().square().sum().cpu()
        self._range_DQ += (residual.T @ (residual @ self._signs_DQ)).double().cpu()

    def tensors(self, layer: str) -> dict[str, Tensor]:
        """Return ``<layer>/range``, float32 (D, Q), and the squared norms ``<layer>/energy``, ``<layer>/residual``."""
        return {
            f"{layer}/range": self._range_DQ.float(),
            f"{layer}/energy": self._energy,
            f"{layer}/residual": self._residual,
        }


class SubspaceResponse(Plugin):
    """Responds to the server's query for the subspace of every layer's inputs.

    Parameters
    ----------
    variant, method, sketch_width
        As the server half has them. ``official`` sketches with G uniform on (-1, 1), in training mode, and reads an
        activation before its dropout. ``corrected`` runs in evaluation mode; its sketch has G / sqrt(Q), G normal,
        which makes the expected energy of the sketch that of the residual. The server chooses the range
        finder's width and signs.
    batch_size
        Samples of one forward pass.
    """

    phase: ClassVar[Phase] = Phase.BOOKKEEPING
    queries: ClassVar[tuple[str, ...]] = ("subspace",)

    def __init__(
        self,
        *,
        variant: Literal["official", "corrected"] = "corrected",
        method: Literal["auto", "gram", "sketch", "range_finder"] = "auto",
        sketch_width: int | None = None,
        batch_size: int = 64,
    ) -> None:
        self.variant, self.method, self.sketch_width, self.batch_size = variant, method, sketch_width, batch_size

    @torch.no_grad()
    def respond(self, ctx: Context, name: str, request: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the tensors of :class:`GramSum`, :class:`Sketch` or :class:`Range` for each layer of the query.

        Parameters
        ----------
        ctx
            Its model holds the weights to use.
        name
            ``subspace``.
        request
            ``<layer>/basis`` (D, K), K = 0 for a layer without a basis; for the range finder also ``<layer>/draw``
            (2,), the seed of its signs and their columns.

        Raises
        ------
        ValueError
            A layer is not in the model, or its inputs are not those of a linear layer or a 2-d convolution.
        """
        named = {key.removesuffix("/basis"): basis for key, basis in request.items() if key.endswith("/basis")}
        layers = {layer: _layer(ctx.model.module, layer) for layer in named}
        sums = {
            layer: self._summary(ctx, basis.to(ctx.device), request.get(f"{layer}/draw"))
            for layer, basis in named.items()
        }
        official = self.variant == "official"
        (ctx.model.train if official else ctx.model.eval)()
        for x in torch.split(ctx.data.x, self.batch_size):
            with _captured(ctx.model.module, layers, before_dropout=official) as inputs:
                ctx.model(x)
            for layer, module in layers.items():
                for read in inputs[layer]:
                    sums[layer].add(layer_rows(module, read))
        return {key: tensor for layer, total in sums.items() for key, tensor in total.tensors(layer).items()}

    def _summary(self, ctx: Context, basis_DK: Tensor, draw: Tensor | None) -> GramSum | Sketch | Range:
        if draw is not None:
            seed, width = draw.tolist()
            return Range(basis_DK, random_signs(len(basis_DK), width, seed).to(ctx.device))
        if self.variant == "corrected" and self.method != "sketch":
            return GramSum(basis_DK.shape[0])
        generator, width = ctx.rng("subspace"), self.sketch_width or basis_DK.shape[0]

        def uniform(rows: int, columns: int) -> Tensor:
            return torch.rand(rows, columns, generator=generator).mul_(2).sub_(1)

        def normal(rows: int, columns: int) -> Tensor:
            return torch.randn(rows, columns, generator=generator).div_(float(columns) ** 0.5)

        return Sketch(basis_DK, width, uniform if self.variant == "official" else normal)


def _layer(network: nn.Module, name: str) -> nn.Linear | nn.Conv2d:
    module = dict(network.named_modules()).get(name)
    if isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.groups == 1):
        return module
    raise ValueError(
        f"strategy.projection.server.layers: {name} is {type(module).__name__}; "
        f"must be a linear layer or a 2-d convolution with one group"
    )


@contextmanager
def _captured(
    network: nn.Module, layers: dict[str, nn.Linear | nn.Conv2d], *, before_dropout: bool
) -> Iterator[dict[str, list[Tensor]]]:
    """Collect each layer's inputs in the forward passes inside; one entry for each call of the layer."""
    inputs: dict[str, list[Tensor]] = {layer: [] for layer in layers}
    dropped: list[tuple[Tensor, Tensor]] = []  # (output, input) of dropout; holding the outputs keeps them distinct

    def reads(layer: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            before = next((source for output, source in dropped if output is args[0]), args[0])
            inputs[layer].append(before)

        return hook

    def drops(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        dropped.append((output, args[0]))

    with ExitStack() as stack:
        for layer, module in layers.items():
            stack.callback(module.register_forward_pre_hook(reads(layer)).remove)
        if before_dropout:
            for random in network.modules():
                if isinstance(random, RandomLayer):
                    stack.callback(random.register_forward_hook(drops).remove)
        yield inputs
