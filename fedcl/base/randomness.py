"""Keyed random streams: each draw belongs to (seed, who, when, why), so it does not depend on where or when it runs."""

from __future__ import annotations

import hashlib

import numpy as np
import torch


def key(*parts: object) -> int:
    """Return a 63-bit integer that depends on the text of ``parts`` alone (not on the process's hash seed)."""
    text = "\x1f".join(str(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def torch_generator(*parts: object) -> torch.Generator:
    """Return a CPU generator seeded by :func:`key` of ``parts``."""
    return torch.Generator().manual_seed(key(*parts))


def numpy_generator(*parts: object) -> np.random.Generator:
    """Return a numpy generator seeded by :func:`key` of ``parts``."""
    return np.random.default_rng(key(*parts))
