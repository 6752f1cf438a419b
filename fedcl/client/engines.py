"""Which engine trains a client. It depends on the configuration alone, so that all processes choose the same."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from fedcl.client.moves import optimizer_of
from fedcl.contracts.learner import LocalTraining, Plugin, overrides
from fedcl.contracts.optimizer import Elementwise
from fedcl.models.chain import chain_of
from fedcl.models.flat import FlatModel
from fedcl.models.networks import RandomLayer

STEP_HOOKS = ("indices", "before_step", "objective", "loss", "after_backward", "after_step")
STACK = 8  # clients trained together: more do not fit into a core's cache,
SMALL = 1 << 15  # except for plain linear networks with at most so many parameters
Engine = Literal["auto", "loop", "fused", "stack"]


def stacks(engine: Engine, model: FlatModel, plugins: Sequence[Plugin], training: LocalTraining) -> str | None:
    """Return why ``engine`` trains clients of this model and learner one after another; None if it stacks them."""
    if engine in ("loop", "fused"):
        return f"engine={engine}"
    if engine == "auto" and chain_of(model.module) is None:
        return "the model is not a plain linear network"
    return _one_by_one(training) or stackable(model, plugins)


def _one_by_one(training: LocalTraining) -> str | None:
    """Return which setting of the training cannot be stacked, None if all can."""
    if training.schedule is not None:
        return "client.schedule.horizon=local changes the learning rate in every step"
    if training.keep:
        return "client.optimizer.state=keep gives each client an optimizer of its own"
    if training.accumulate > 1:
        return f"client.accumulate={training.accumulate} makes one step of several batches"
    if training.augment is not None:
        return "data.augment changes the samples of every step"
    optimizer = optimizer_of(training)
    return None if isinstance(optimizer, Elementwise) else f"{type(optimizer).__name__} moves one client at a time"


def stackable(model: FlatModel, plugins: Sequence[Plugin]) -> str | None:
    """Return why clients of this model and learner cannot be trained together, None if they can."""
    for plugin in plugins:
        hook = next((hook for hook in STEP_HOOKS if overrides(plugin, hook)), None)
        if hook is not None:
            return f"{type(plugin).__name__} takes part in every step ({hook})"
    if chain_of(model.module) is not None:
        return None
    if any(tensor.kind == "buffer" for tensor in model.spec):
        return "the model keeps running statistics"
    if any(isinstance(layer, RandomLayer) for layer in model.module.modules()):
        return "the model draws random numbers in its layers"
    return None


def stack_size(model: FlatModel) -> int:
    """Return how many clients are trained together at most."""
    small = chain_of(model.module) is not None and model.num_parameters <= SMALL
    return 2 * STACK if small else STACK
