"""What a forward pass costs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode


@torch.no_grad()
def flops(model: nn.Module, input_shape: Sequence[int]) -> int:
    """Return the floating-point operations of one sample's forward pass in evaluation mode.

    Matrix products and convolutions are counted, two operations for each multiply-add; element-wise work is not. A
    training step on a sample is commonly taken as three forward passes. Runs the model once: keep the result.

    Parameters
    ----------
    model
        The network; its training mode is as before afterwards.
    input_shape
        Shape of one sample.
    """
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    training = model.training
    model.eval()
    try:
        with FlopCounterMode(display=False) as counter:
            model(torch.zeros((1, *input_shape), device=device))
    finally:
        model.train(training)
    return int(counter.get_total_flops())
