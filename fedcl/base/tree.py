"""Nested state as JSON plus named tensors: the only form in which state is stored or sent. Never pickle."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

_TENSOR = "__tensor__"


def pack(tree: Any) -> tuple[Any, dict[str, Tensor]]:
    """Split ``tree`` into JSON values and tensors, each tensor named by its path.

    Raises
    ------
    TypeError
        If a leaf is neither a tensor, a number, a string, a bool, None nor a list or dict of them.
    """
    tensors: dict[str, Tensor] = {}
    return _pack(tree, "", tensors), tensors


def _pack(node: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    if isinstance(node, Tensor):
        tensors[path] = node.detach().cpu().contiguous()
        return {_TENSOR: path}
    if isinstance(node, np.ndarray):
        raise TypeError(f"state at {path or 'the top'} is a numpy array: keep tensors in state")
    if isinstance(node, dict):
        wrong = [key for key in node if not isinstance(key, str) or key == _TENSOR]
        if wrong:
            raise TypeError(f"state at {path or 'the top'} has the key {wrong[0]!r}: keys must be strings")
        return {key: _pack(value, _below(path, key), tensors) for key, value in node.items()}
    if isinstance(node, (list, tuple)):
        return [_pack(value, _below(path, str(i)), tensors) for i, value in enumerate(node)]
    if node is None or isinstance(node, (bool, int, float, str)):
        return node
    raise TypeError(f"state at {path or 'the top'} is a {type(node).__name__}: it cannot be stored")


def _below(path: str, key: str) -> str:
    """Return the name of what lies under ``key``; a slash within a key must not look like one between keys."""
    escaped = key.replace("%", "%25").replace("/", "%2F")
    return f"{path}/{escaped}" if path else escaped


def unpack(node: Any, tensors: dict[str, Tensor]) -> Any:
    """Join what :func:`pack` split."""
    if isinstance(node, dict):
        if set(node) == {_TENSOR}:
            return tensors[node[_TENSOR]]
        return {key: unpack(value, tensors) for key, value in node.items()}
    if isinstance(node, list):
        return [unpack(value, tensors) for value in node]
    return node


def num_bytes(tree: Any) -> int:
    """Return how many bytes the tensors of a tree hold."""
    return sum(tensor.nbytes for tensor in pack(tree)[1].values())


def clone(tree: Any, device: torch.device | None = None) -> Any:
    """Return a deep copy of ``tree``, moved to ``device`` if one is given: no tensor is shared with the original."""
    if isinstance(tree, Tensor):
        return tree.detach().to(tree.device if device is None else device, copy=True)
    if isinstance(tree, dict):
        return {key: clone(value, device) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return [clone(value, device) for value in tree]
    return tree


def equal(a: Any, b: Any) -> bool:
    """Whether two trees hold the same values, bit for bit."""
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return isinstance(a, Tensor) and isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(equal(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)
