"""What is learned of a model as one flat vector, and the table that says which slice is which tensor."""

# P = length of the flat vector: all parameters that are trained, then all floating-point buffers that training moves
from __future__ import annotations

import copy
import functools
import re
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.dropout import _DropoutNd

from fedcl.models.fixed import digest_of, every_tensor, fixed_tensors, learned_tensors, still_layers
from fedcl.models.networks import Output, RandomLayer

_NORMS = (_NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)
_HEAD = re.compile(r"^heads?\.")  # not a layer of a foreign module's that is called so
_HEAD_WEIGHT = re.compile(r"(head|heads\.\d+)\.weight")
_HEAD_OF_TASK = re.compile(r"^heads\.(\d+)\.")


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor of a model: its name, its shape, and its slice ``start:stop`` of the flat vector.

    ``task`` is the index of the task head that owns the tensor (named ``heads.<task>.*``), None for shared tensors.
    ``norm`` says that a normalisation layer (batch, instance, group, layer or RMS norm) owns it, be it a parameter or a
    running statistic.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    stop: int
    kind: Literal["parameter", "buffer"]
    task: int | None
    norm: bool = False

    @property
    def size(self) -> int:
        """Number of elements."""
        return self.stop - self.start


def is_head(tensor: TensorSpec) -> bool:
    """Whether ``tensor`` belongs to a head: ``head.*``, or ``heads.<k>.*`` where tasks have their own."""
    return _HEAD.search(tensor.name) is not None


class Spec:
    """The layout of a flat vector: an immutable sequence of :class:`TensorSpec` without gaps."""

    __slots__ = ("_by_name", "_starts", "_tensors", "size")

    def __init__(self, tensors: Iterable[TensorSpec]) -> None:
        self._tensors = tuple(tensors)
        self._by_name = {tensor.name: tensor for tensor in self._tensors}
        self._starts = [tensor.start for tensor in self._tensors]
        self.size = self._tensors[-1].stop if self._tensors else 0
        end = 0
        for tensor in self._tensors:
            if tensor.start != end or tensor.size != prod(tensor.shape):
                raise ValueError(f"tensor {tensor.name}: {tensor.shape} does not fill {tensor.start}:{tensor.stop}")
            end = tensor.stop
        if len(self._by_name) != len(self._tensors):
            raise ValueError("two tensors of a spec have the same name")

    @classmethod
    def of(cls, module: nn.Module) -> Spec:
        """Return the layout of what a module learns: parameters in its order, then floating-point buffers."""
        tensors, start = [], 0
        for name, tensor, kind in learned_tensors(module):
            owner = _HEAD_OF_TASK.search(name)
            stop = start + tensor.numel()
            task = int(owner[1]) if owner else None
            norm = isinstance(module.get_submodule(name.rpartition(".")[0]), _NORMS)
            tensors.append(TensorSpec(name, tuple(tensor.shape), start, stop, kind, task, norm))
            start = stop
        return cls(tensors)

    def __iter__(self) -> Iterator[TensorSpec]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __getitem__(self, name: str) -> TensorSpec:
        return self._by_name[name]

    def __contains__(self, name: object) -> bool:
        return name in self._by_name

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Spec) and self._tensors == other._tensors

    def __hash__(self) -> int:
        return hash(self._tensors)

    def __repr__(self) -> str:
        return f"Spec({len(self)} tensors, {self.size} elements)"

    def view(self, vector: Tensor, name: str) -> Tensor:
        """Return tensor ``name`` of a flat ``vector`` (P,), as a view in its own shape.

        Raises
        ------
        ValueError
            ``vector`` has another shape than (P,).
        KeyError
            There is no such tensor.
        """
        if vector.shape != (self.size,):
            raise ValueError(f"vector has shape {tuple(vector.shape)}, the spec describes ({self.size},)")
        tensor = self._by_name[name]
        return vector[tensor.start : tensor.stop].view(tensor.shape)

    def sizes(self) -> dict[str, int]:
        """Return the lengths that declarations of tensors name (:class:`fedcl.contracts.fields.TensorField`).

        ``columns`` and ``features`` are those of heads with weights (columns, features), where the model has such.
        """
        sizes = {"model": self.size, "bitmask": -(-self.size // 8)}
        sizes["parameters"] = max((tensor.stop for tensor in self if tensor.kind == "parameter"), default=0)
        heads = [tensor.shape for tensor in self if _HEAD_WEIGHT.fullmatch(tensor.name) and len(tensor.shape) == 2]
        if heads:
            sizes |= {"columns": sum(columns for columns, _ in heads), "features": heads[0][1]}
        return sizes

    def tensor_at(self, index: int) -> TensorSpec:
        """Return the tensor that flat position ``index`` belongs to; IndexError outside [0, P)."""
        if not 0 <= index < self.size:
            raise IndexError(f"position {index} is outside [0, {self.size})")
        return self._tensors[bisect_right(self._starts, index) - 1]


class FlatModel:
    """A module of which all that is learned is views of one float32 vector ``flat`` (P,).

    Writing ``flat`` changes the module, and an optimizer step on the module changes ``flat``: nothing is ever copied
    between the two. What is fixed (:mod:`fedcl.models.fixed`) and integer buffers stay outside the vector.

    Parameters
    ----------
    module
        The network; taken over, moved to ``device``. Its forward pass must return an :class:`Output`.
    device
        Where the vector lives.

    Raises
    ------
    ValueError
        A tensor is not float32, or a layer is torch's own dropout, which draws from the global random state.
    """

    def __init__(self, module: nn.Module, *, device: torch.device | str = "cpu") -> None:
        for name, layer in module.named_modules():
            if isinstance(layer, _DropoutNd):
                raise ValueError(
                    f"model: layer {name} is torch's {type(layer).__name__}, which draws from the global random state; "
                    "use fedcl.models.networks.Dropout"
                )
        self.module = module.to(device)
        self.device = torch.device(device)
        self.spec = Spec.of(self.module)
        self.flat = torch.empty(self.spec.size, dtype=torch.float32, device=self.device)
        self._point_module_at_flat()
        self.fixed: dict[str, Tensor] = fixed_tensors(self.module)
        self._still = list(still_layers(self.module).values())
        self.trainable: list[nn.Parameter] = [p for p in self.module.parameters() if p.requires_grad]
        self.parameter_specs: list[TensorSpec] = [tensor for tensor in self.spec if tensor.kind == "parameter"]

    def _point_module_at_flat(self) -> None:
        for name, tensor, kind in learned_tensors(self.module):
            if tensor.dtype != torch.float32:
                raise ValueError(f"model: tensor {name} is {tensor.dtype}; a flat model holds torch.float32 only")
            view = self.spec.view(self.flat, name)
            view.copy_(tensor.detach())
            if kind == "parameter":
                tensor.data = view
            else:
                path, _, leaf = name.rpartition(".")
                setattr(self.module.get_submodule(path), leaf, view)

    @property
    def num_parameters(self) -> int:
        """Number of elements of trained parameters: the length of the vector's head before the buffers."""
        return self.parameter_specs[-1].stop if self.parameter_specs else 0

    @property
    def num_fixed(self) -> int:
        """Number of elements of fixed tensors."""
        return sum(tensor.numel() for tensor in self.fixed.values())

    @functools.cached_property
    def base_digest(self) -> str:
        """SHA-256 of the fixed tensors, by which two processes know that they have the same; empty without any."""
        return digest_of(self.fixed)

    def __call__(self, x: Tensor) -> Output:
        """Run the module on a batch of samples."""
        return cast(Output, self.module(x))

    def load(self, vector: Tensor) -> None:
        """Copy ``vector`` (P,) float32, on any device, into the model.

        Raises
        ------
        ValueError
            Another shape or dtype.
        """
        if vector.shape != self.flat.shape or vector.dtype != torch.float32:
            raise ValueError(
                f"vector has shape {tuple(vector.shape)} and {vector.dtype}; "
                f"the model needs ({self.spec.size},) and torch.float32"
            )
        self.flat.copy_(vector.detach())

    def vector(self) -> Tensor:
        """Return a copy of the flat vector (P,)."""
        return self.flat.clone()

    def views(self, vector: Tensor) -> list[Tensor]:
        """Return the slices of ``vector``, at least as long as the parameters, that belong to the parameters.

        Each is a view in its parameter's shape, in the order of ``trainable``.
        """
        return [vector[tensor.start : tensor.stop].view(tensor.shape) for tensor in self.parameter_specs]

    def flatten(self, tensors: Sequence[Tensor]) -> Tensor:
        """Return one tensor for each parameter of ``trainable`` as one vector."""
        return torch.cat([tensor.reshape(-1) for tensor in tensors])

    def copy(self) -> FlatModel:
        """Return an independent model of the same kind, with this one's weights now; they share the fixed tensors."""
        every = every_tensor(self.module)
        shared = {id(every[name]): every[name] for name in self.fixed}
        return FlatModel(copy.deepcopy(self.module, shared), device=self.device)

    def train(self) -> None:
        """Switch the module to training mode, but for normalisation layers whose statistics are fixed."""
        self.module.train()
        for layer in self._still:
            layer.eval()

    def eval(self) -> None:
        """Switch the module to evaluation mode."""
        self.module.eval()

    def set_generator(self, generator: torch.Generator | None) -> None:
        """Let every random layer draw from ``generator``."""
        for layer in self.module.modules():
            if isinstance(layer, RandomLayer):
                layer.set_generator(generator)
