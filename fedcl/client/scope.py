"""Which tensors of a model a loss term applies to: a regular expression over their names."""

from __future__ import annotations

import re

import torch
from torch import Tensor

from fedcl.models.flat import FlatModel

# P = parameter elements
_SHOWN = 8  # tensor names in an error


def check_scope(scope: str | None, key: str) -> None:
    """Reject a ``scope`` that is not a regular expression; None means every tensor.

    Raises
    ------
    ValueError
        Naming ``key``, the configuration key.
    """
    try:
        re.compile(scope or "")
    except re.error as error:
        raise ValueError(f"{key}={scope!r}: must be a regular expression or null ({error})") from error


def in_scope(model: FlatModel, scope: str | None, key: str) -> Tensor | None:
    """Return 1 for the parameters in ``scope`` and 0 for the others, (P,); None where all are.

    A tensor is in scope if the expression is found anywhere in its name: ``attn`` matches attention blocks,
    ``^(?!head)`` all tensors except heads.

    Raises
    ------
    ValueError
        If no parameter's name matches, naming ``key`` and existing names.
    """
    if scope is None:
        return None
    chosen = [spec for spec in model.parameter_specs if re.search(scope, spec.name)]
    if not chosen:
        names = [spec.name for spec in model.parameter_specs]
        shown = ", ".join(names[:_SHOWN]) + (f", and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
        raise ValueError(f"{key}={scope!r}: matches no tensor of the model, which has {shown}")
    held = torch.zeros(model.num_parameters, device=model.device)
    for spec in chosen:
        held[spec.start : spec.stop] = 1.0
    return held
