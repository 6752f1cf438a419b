"""A bound on what a network may take, kept while it is being built: before the memory is taken, not after."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from fedcl.base.memory import free_memory, gib
from fedcl.config.value_rules import ConfigError

_SIZED = frozenset({torch.empty, torch.zeros, torch.ones, torch.rand, torch.randn, torch.full, torch.eye})
_MOST_TENSORS = 5_000
_COPIES = 4  # of the weights that training holds at least: the model, its gradients, an update, the server's


class TooLarge(ConfigError):
    """A network that would take more than there is."""


class Budget(TorchFunctionMode):
    """Count the tensors that are made within it, and raise TooLarge before one that does not fit is allocated."""

    def __init__(self) -> None:
        super().__init__()
        self._free = free_memory()
        self._bytes = self._tensors = 0

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Count what ``func`` is about to make, and call it."""
        kwargs = kwargs or {}
        if func in _SIZED:
            self._count(kwargs.get("size", args))
        return func(*args, **kwargs)

    def _count(self, size: Any) -> None:
        sides = size[0] if size and isinstance(size[0], (tuple, list)) else size
        self._tensors += 1
        self._bytes += 4 * prod(side for side in sides if isinstance(side, int))
        if self._bytes * _COPIES > self._free:
            raise TooLarge(
                f"the network would take {gib(self._bytes)} or more, and training it {_COPIES} times that; this "
                f"machine has {gib(self._free)} free"
            )
        if self._tensors > _MOST_TENSORS:
            raise TooLarge(f"the network would have more than {_MOST_TENSORS} tensors")
