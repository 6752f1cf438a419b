"""Whether a network of a user's own keeps the promises that every other one keeps."""

from __future__ import annotations

import copy
import random
from collections.abc import Sequence

import numpy as np
import torch

from fedcl.models.fixed import fixed_tensors
from fedcl.models.flat import FlatModel
from fedcl.models.module import ModuleNetwork
from fedcl.models.networks import Output, RandomLayer


def check_network(model: FlatModel, input_shape: Sequence[int], columns: int) -> None:
    """Run a copy of a model once in training mode, on two samples of zeros, and look at what that leaves behind.

    Parameters
    ----------
    model
        The network; neither it nor a global random state changes.
    input_shape
        Shape of one sample.
    columns
        Logit columns of all heads together.

    Raises
    ------
    ValueError
        The forward pass draws from a global random state, changes what the flat vector does not hold, or does not
        return logits of so many columns and their features.
    """
    foreign = isinstance(model.module, ModuleNetwork)
    name = type(model.module.body if foreign else model.module).__name__
    checked = FlatModel(copy.deepcopy(model.module))
    checked.train()
    module = checked.module
    for layer in module.modules():
        if isinstance(layer, RandomLayer):
            layer.set_generator(torch.Generator())
    before = {place: tensor.clone() for place, tensor in checked.fixed.items()}
    drawn, numpy_state, python_state = torch.get_rng_state(), np.random.get_state(), random.getstate()  # noqa: NPY002
    try:
        with torch.no_grad():
            out = module(torch.zeros((2, *input_shape)))
        moved = (
            not torch.equal(drawn, torch.get_rng_state())
            or repr(numpy_state) != repr(np.random.get_state())  # noqa: NPY002
            or python_state != random.getstate()
        )
    finally:
        torch.set_rng_state(drawn)
        np.random.set_state(numpy_state)  # noqa: NPY002
        random.setstate(python_state)
    if moved:
        own = "use fedcl.models.networks.Dropout, or draw from the generator of a RandomLayer"
        remedy = "set the probabilities of its functional dropout to 0" if foreign else own
        raise ValueError(
            f"model: {name} draws from a global random state while it trains, so that no run could be repeated; "
            f"{remedy}"
        )
    for place, tensor in fixed_tensors(module).items():
        if place not in before or not torch.equal(tensor, before[place]):
            raise ValueError(
                f"model: {name} changes its buffer {place} ({tensor.dtype}) while it trains, which is neither sent nor "
                "saved; make it a persistent float32 buffer, or do without"
            )
    if not isinstance(out, Output):
        raise ValueError(
            f"model: {name}.forward returns a {type(out).__name__}; it must derive from fedcl.models.networks.Network "
            "and end with return self.classify(features)"
        )
    if out.logits.shape != (2, columns):
        raise ValueError(f"model: {name} has logits of shape {tuple(out.logits.shape)}, must be (samples, {columns})")
