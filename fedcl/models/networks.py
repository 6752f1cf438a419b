"""Networks: a body that computes features, and one or several linear heads whose logits are concatenated."""

# B = batch, F = features, L = logit columns over all heads, C = channels, H, W = height, width
from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from math import prod
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedcl.models.budget import Budget
from fedcl.models.heads import RandomFeatures, UnitFeatures, make_heads, simplex_features
from fedcl.models.pretrained import load_weights

M = TypeVar("M", bound=nn.Module)

_LENET_MIN = 16


class Output(NamedTuple):
    """What a forward pass returns: logits (B, L) of all heads side by side, and the features (B, F) they read."""

    logits: Tensor
    features: Tensor


class RandomLayer(nn.Module):
    """A layer that draws from a generator of its own while training, never from torch's global random state."""

    def __init__(self) -> None:
        super().__init__()
        self.generator: torch.Generator | None = None

    def set_generator(self, generator: torch.Generator | None) -> None:
        """Draw from ``generator`` from now on; one on the CPU gives the same draws whatever device the model is on."""
        self.generator = generator


class Dropout(RandomLayer):
    """Inverted dropout: zeroes an entry with probability ``p``, divides the others by 1 - p; the identity in eval mode.

    RuntimeError for a forward pass in training before ``set_generator``.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = float(p)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x`` with entries dropped; same shape."""
        if not self.training or self.p == 0.0:
            return x
        if self.generator is None:
            raise RuntimeError("Dropout in training mode has no generator: call FlatModel.set_generator first")
        keep = torch.rand(x.shape, generator=self.generator, device=self.generator.device) >= self.p
        return x * keep.to(x.device, x.dtype) / (1.0 - self.p)

    def extra_repr(self) -> str:
        """Return the part of ``repr`` inside the brackets."""
        return f"p={self.p}"


BETWEEN = ("embed", "expand", "unit")  # layers between body and heads, in their order; see Network.attach_heads


class Network(nn.Module):
    """Base of all networks: owns the heads.

    One head is a module named ``head``; several are an ``nn.ModuleList`` named ``heads``, so that the tensors of head k
    are called ``heads.<k>.weight`` and so on. Every head has its columns' weights (columns, F) as ``weight``.
    """

    def attach_heads(
        self,
        num_features: int,
        heads: Sequence[int],
        *,
        kind: str = "linear",
        scale: float | None = None,
        width: int | None = None,
    ) -> None:
        """Create the heads: ``heads[k]`` logit columns for head k, each reading ``num_features`` features.

        Parameters
        ----------
        num_features
            Width of what the body computes. With ``kind="simplex"`` a linear layer ``embed`` follows, with ``"random"``
            fixed random features, with ``"unit"`` scaling to length 1; what comes out of them are then the features.
        heads
            Logit columns of each head.
        kind
            linear, cosine, simplex, random or unit: see `fedcl.models.heads`.
        scale
            What cosines and simplex logits are multiplied by; None is a learned scale for cosine, 1 for simplex.
        width
            How many random features; ``kind="random"`` needs it.

        Raises
        ------
        ValueError
            There is no head, or one without columns, no such kind, or a scale or width that is not positive, or given
            where it is not used.
        """
        if not heads or min(heads) < 1:
            raise ValueError(f"heads={tuple(heads)}: must be at least one head, each with at least one column")
        if kind == "simplex":
            self.embed = nn.Linear(num_features, simplex_features(sum(heads)))
        if (kind == "random") != (width is not None):
            raise ValueError(f"model.head_width={width}: must be >= 1 with model.head=random, null with others")
        if width is not None:
            self.expand = RandomFeatures(num_features, width)
        if kind == "unit":
            self.unit = UnitFeatures()
        made = make_heads(width or num_features, heads, kind=kind, scale=scale)
        if len(heads) == 1:
            self.head = made[0]
        else:
            self.heads = nn.ModuleList(made)

    def prepare(self, *, pretrained: str | None, freeze: str | None) -> None:
        """Freeze parameters and load weights from a file; the last step of every constructor.

        Parameters
        ----------
        pretrained
            A file for `fedcl.models.pretrained.load_weights`, or None.
        freeze
            Regular expression searched for in the parameters' names; those that match are fixed
            (:mod:`fedcl.models.fixed`). None freezes nothing.

        Raises
        ------
        ValueError
            The file does not fit, or the expression is not valid, matches nothing, or leaves nothing to train.
        """
        if freeze is not None:
            self._freeze(freeze)
        if pretrained is not None:
            load_weights(self, pretrained)

    def _freeze(self, pattern: str) -> None:
        try:
            chosen = {name for name, _ in self.named_parameters() if re.search(pattern, name)}
        except re.error as error:
            raise ValueError(f"model.freeze={pattern!r}: must be a regular expression ({error})") from error
        if not chosen or len(chosen) == len(list(self.parameters())):
            raise ValueError(f"model.freeze={pattern!r}: must match some parameters and leave some to train")
        for name, parameter in self.named_parameters():
            if name in chosen:
                parameter.requires_grad_(False)

    def classify(self, features: Tensor) -> Output:
        """Apply the heads to the body's features (B, F) and return logits and features."""
        # a module's own attributes take a search each: this runs at every step, on networks of a few layers
        modules = self._modules
        for name in BETWEEN:
            layer = modules.get(name)
            if layer is not None:
                features = layer(features)
        head = modules.get("head")
        if head is not None:
            return Output(head(features), features)
        return Output(torch.cat([head(features) for head in self.heads], dim=1), features)


class MLP(Network):
    """Fully connected network: flatten, then linear, ReLU and dropout for each entry of ``hidden``, then the heads.

    Parameters
    ----------
    input_shape
        Shape of one sample; flattened.
    heads
        Logit columns of each head.
    hidden
        Widths of the hidden layers; empty gives a linear classifier.
    dropout
        Drop probability after each hidden layer, as long as ``hidden``; None for no dropout. FOT's network for permuted
        MNIST (Bakman et al. 2024, official code) is hidden 400-400-400 with dropout 0.2, 0.5, 0.5.
    head, head_scale, head_width, pretrained, freeze
        As in `Network.attach_heads` and `Network.prepare`.
    """

    def __init__(
        self,
        *,
        input_shape: Sequence[int],
        heads: Sequence[int],
        hidden: Sequence[int] = (64,),
        dropout: Sequence[float] | None = None,
        head: str = "linear",
        head_scale: float | None = None,
        head_width: int | None = None,
        pretrained: str | None = None,
        freeze: str | None = None,
    ) -> None:
        super().__init__()
        if dropout is not None and len(dropout) != len(hidden):
            raise ValueError(f"model.dropout={list(dropout)}: must be null or one entry for each of model.hidden")
        widths = [prod(input_shape), *hidden]
        self.hidden = nn.ModuleList([nn.Linear(a, b) for a, b in pairwise(widths)])
        self.dropouts = nn.ModuleList([Dropout(p) for p in dropout or [0.0] * len(hidden)])
        self.attach_heads(widths[-1], heads, kind=head, scale=head_scale, width=head_width)
        self.prepare(pretrained=pretrained, freeze=freeze)

    def forward(self, x: Tensor) -> Output:
        """Map samples (B, *input_shape) to logits (B, L) and the last hidden activation (B, F)."""
        x = x.flatten(1)
        for linear, dropout in self._layers():
            x = functional.relu(linear(x))
            x = dropout(x) if dropout.p else x
        return self.classify(x)

    def _layers(self) -> Iterator[tuple[nn.Linear, Dropout]]:
        # not the lists' own iterators, which look up every attribute on the way: see `classify`
        hidden, dropouts = self._modules["hidden"], self._modules["dropouts"]
        pairs: Any = zip(hidden._modules.values(), dropouts._modules.values(), strict=True)  # type: ignore[union-attr]
        return cast(Iterator[tuple[nn.Linear, Dropout]], pairs)


class LeNet(Network):
    """LeNet-5 (LeCun et al. 1998) in its usual modern form: ReLU and max pooling, no padding.

    Convolutions 6@5x5 and 16@5x5, each followed by 2x2 max pooling, then linear layers of 120 and 84 features. Takes
    (C, H, W) samples of at least 16x16. The last five parameters are those of `MLP`.
    """

    def __init__(
        self,
        *,
        input_shape: Sequence[int],
        heads: Sequence[int],
        head: str = "linear",
        head_scale: float | None = None,
        head_width: int | None = None,
        pretrained: str | None = None,
        freeze: str | None = None,
    ) -> None:
        super().__init__()
        if len(input_shape) != 3 or min(input_shape[1:]) < _LENET_MIN:
            raise ValueError(
                f"model=lenet: samples of shape {tuple(input_shape)} do not fit; needs (C, H, W) with H and W at least "
                f"{_LENET_MIN}; use model=mlp"
            )
        channels, height, width = input_shape
        self.conv1 = nn.Conv2d(channels, 6, 5)
        self.conv2 = nn.Conv2d(6, 16, 5)
        self.fc1 = nn.Linear(16 * self._pooled(height) * self._pooled(width), 120)
        self.fc2 = nn.Linear(120, 84)
        self.attach_heads(84, heads, kind=head, scale=head_scale, width=head_width)
        self.prepare(pretrained=pretrained, freeze=freeze)

    @staticmethod
    def _pooled(length: int) -> int:
        return ((length - 4) // 2 - 4) // 2

    def forward(self, x: Tensor) -> Output:
        """Map images (B, C, H, W) to logits (B, L) and features (B, 84)."""
        x = functional.max_pool2d(functional.relu(self.conv1(x)), 2)
        x = functional.max_pool2d(functional.relu(self.conv2(x)), 2)
        x = functional.relu(self.fc1(x.flatten(1)))
        return self.classify(functional.relu(self.fc2(x)))


def build_model(factory: Callable[[], M], *, seed: int) -> M:
    """Return ``factory()`` with its initial weights drawn from ``seed``; torch's global random state is left as it was.

    The factory must build on the CPU, which makes the weights the same whatever device the model moves to. TooLarge for
    a network that would take more memory than there is.
    """
    with torch.random.fork_rng(devices=[]), Budget():
        # Not torch.manual_seed: that one also reseeds the accelerators, which the fork does not restore.
        torch.default_generator.manual_seed(seed)
        return factory()
