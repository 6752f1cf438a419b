"""Is a reply fit to enter an aggregate? Pure, so that it can run wherever the reply is."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from fedcl.client.plugin import Payload
from fedcl.messages import Reply
from fedcl.models.flat import Spec

MAX_EXAMPLES = 1_000_000_000


def uploads(payloads: Iterable[Payload], spec: Spec) -> dict[str, tuple[int, ...] | None]:
    """Return what the reply to every train message carries of ``payloads``: by name its shape, None for any."""
    return {
        p.name: (spec.size,) if p.like_model else None
        for p in payloads
        if p.direction == "up" and p.when == "every_train"
    }


def rejection(
    reply: Reply,
    spec: Spec,
    payloads: Mapping[str, tuple[int, ...] | None],
    *,
    model: bool,
    base: Tensor | None = None,
    max_norm: float | None = None,
) -> str | None:
    """Return why ``reply`` must not be used, naming the tensor at fault, or None when it is sound.

    Parameters
    ----------
    payloads
        Uploads the reply must carry, with their shapes where known.
    model
        Whether a model vector is expected.
    base, max_norm
        The weights that were sent, float32 (P,), and the largest L2 norm that a change of them may have; None for any.
    """
    if not 0 <= reply.num_examples <= MAX_EXAMPLES:
        return f"num_examples={reply.num_examples}: must be in [0, {MAX_EXAMPLES}]"
    for name, value in reply.metrics.items():
        if not math.isfinite(value):
            return f"metric {name} is {value}"
    if model:
        reason = _vector(reply.model, spec)
        if reason is not None:
            return reason
        if max_norm is not None and reply.model is not None and base is not None:
            norm = change_norm(reply.model, base)
            if norm > max_norm:
                return f"the change has norm {norm:.6g}, beyond max_update_norm={max_norm:g}"
    if reply.num_examples == 0:
        return None
    if set(reply.payload) != set(payloads):
        return f"payload holds {sorted(reply.payload)}, expected {sorted(payloads)}"
    for name, shape in payloads.items():
        tensor = reply.payload[name]
        if shape is not None and tuple(tensor.shape) != shape:
            return f"payload {name} has shape {tuple(tensor.shape)}, expected {shape}"
        if tensor.is_complex():
            return f"payload {name} is {tensor.dtype}: must be real"
        if not bool(torch.isfinite(tensor).all()):
            return f"payload {name} is not finite"
    return None


def change_norm(model: Tensor, base: Tensor) -> float:
    """Return the L2 norm of ``model - base``, both float32 (P,)."""
    norm = float(torch.dist(model, base))
    # a square may overflow where the norm does not
    return norm if math.isfinite(norm) else float(torch.linalg.vector_norm(model.double() - base.double()))


def _vector(vector: Tensor | None, spec: Spec) -> str | None:
    if vector is None:
        return "no model in the reply"
    if vector.dtype != torch.float32:
        return f"model is {vector.dtype}, sent was torch.float32"
    if tuple(vector.shape) != (spec.size,):
        return f"model has shape {tuple(vector.shape)}, sent was {(spec.size,)}"
    # one pass over memory, and what is not a number is neither the least nor the largest: it is both
    if math.isfinite(sum(float(bound) for bound in torch.aminmax(vector))):
        return None
    bad = int(torch.nonzero(~torch.isfinite(vector))[0])
    tensor = spec.tensor_at(bad)
    return f"tensor {tensor.name} holds {float(vector[bad])} at position {bad - tensor.start}"
