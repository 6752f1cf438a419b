"""Residual networks of basic blocks (He et al., CVPR 2016), with the stems and normalisations used in federations."""

# B = batch, C = channels, H, W = height, width, F = features
from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedcl.models.networks import Network, Output


class BatchNorm2d(nn.BatchNorm2d):
    """Torch's batch norm, but for two things that torch refuses.

    While training, a batch with a single value a channel: a client with one sample, or one left over in its last batch,
    meets it where images have shrunk to 1x1. Its variance is not defined, so it is normalised by the running
    statistics, which stay as they are. In evaluation, statistics that are part of a vector one differentiates by, as
    when a server repeats a client's steps: they count as constants there.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Return normalised ``input`` (B, C, H, W); same shape."""
        if self.training and input.numel() > input.shape[1]:
            return super().forward(input)
        assert self.running_mean is not None
        assert self.running_var is not None
        mean, variance = self.running_mean.detach(), self.running_var.detach()
        return functional.batch_norm(input, mean, variance, self.weight, self.bias, False, 0.0, self.eps)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut, which is a 1x1 convolution where shapes differ."""

    def __init__(self, inputs: int, outputs: int, stride: int, norm: str, groups: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = _norm(outputs, norm, groups)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = _norm(outputs, norm, groups)
        self.downsample: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            self.downsample = nn.Sequential(shortcut, _norm(outputs, norm, groups))

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C_in, H, W) to (B, C_out, H / stride, W / stride)."""
        out = functional.relu(self.bn1(self.conv1(x)))
        return functional.relu(self.bn2(self.conv2(out)) + self.downsample(x))


class ResNet(Network):
    """Residual network of basic blocks; stage i has ``width * 2**i`` channels and, but for the first, stride 2.

    Tensors are named as in torchvision (``conv1``, ``bn1``, ``layer1.0.conv1``, ...; ``bn*`` whatever the norm), so
    that weights published for it can be loaded. Convolutions have no bias.

    Parameters
    ----------
    input_shape
        (C, H, W) of one sample.
    heads
        Logit columns of each head.
    blocks
        Blocks of each stage: [2, 2, 2, 2] is ResNet-18; [1, 1, 1] and [1, 1, 1, 1] are the ResNet-8 and ResNet-10 of
        FedCAC (Wu et al. 2023, official code).
    width
        Channels of the first stage.
    stem
        small: a 3x3 convolution of stride 1; imagenet: 7x7 of stride 2, then 3x3 max pooling of stride 2.
    norm
        group, batch or none. Batch norm's running statistics are state: clients average them with the weights.
    groups
        Groups of group norm; must divide ``width``.
    head, head_scale, head_width, pretrained, freeze
        As in `Network.attach_heads` and `Network.prepare`.

    Raises
    ------
    ValueError
        The samples are not images, or the groups do not divide the width.
    """

    def __init__(
        self,
        *,
        input_shape: Sequence[int],
        heads: Sequence[int],
        blocks: Sequence[int],
        width: int = 64,
        stem: str = "small",
        norm: str = "group",
        groups: int = 32,
        head: str = "linear",
        head_scale: float | None = None,
        head_width: int | None = None,
        pretrained: str | None = None,
        freeze: str | None = None,
    ) -> None:
        super().__init__()
        _check(input_shape, width, norm, groups)
        channels = input_shape[0]
        if stem == "small":
            self.conv1 = nn.Conv2d(channels, width, 3, padding=1, bias=False)
            self.maxpool: nn.Module = nn.Identity()
        else:
            self.conv1 = nn.Conv2d(channels, width, 7, 2, padding=3, bias=False)
            self.maxpool = nn.MaxPool2d(3, 2, padding=1)
        self.bn1 = _norm(width, norm, groups)
        self.stages = [f"layer{i + 1}" for i in range(len(blocks))]
        inputs = width
        for i, (stage, count) in enumerate(zip(self.stages, blocks, strict=True)):
            outputs = width << i
            layers = [BasicBlock(inputs, outputs, 2 if i else 1, norm, groups)]
            layers += (BasicBlock(outputs, outputs, 1, norm, groups) for _ in range(count - 1))
            self.add_module(stage, nn.Sequential(*layers))
            inputs = outputs
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
        self.attach_heads(inputs, heads, kind=head, scale=head_scale, width=head_width)
        self.prepare(pretrained=pretrained, freeze=freeze)

    def forward(self, x: Tensor) -> Output:
        """Map images (B, C, H, W) to logits (B, L) and the last stage's mean over positions (B, F)."""
        x = self.maxpool(functional.relu(self.bn1(self.conv1(x))))
        for stage in self.stages:
            x = self.get_submodule(stage)(x)
        return self.classify(torch.flatten(functional.adaptive_avg_pool2d(x, 1), 1))


def _norm(channels: int, norm: str, groups: int) -> nn.Module:
    if norm == "group":
        return nn.GroupNorm(groups, channels)
    return BatchNorm2d(channels) if norm == "batch" else nn.Identity()


def _check(input_shape: Sequence[int], width: int, norm: str, groups: int) -> None:
    if len(input_shape) != 3:
        raise ValueError(f"model=resnet: samples of shape {tuple(input_shape)} do not fit; needs images (C, H, W)")
    if norm == "group" and width % groups:
        raise ValueError(f"model.width={width}, model.groups={groups}: the groups must divide the width")
