"""Networks, heads, and the flat view of a model's state."""

from __future__ import annotations

from fedcl.models.flat import FlatModel, Spec, TensorSpec
from fedcl.models.networks import Output, build_model

__all__ = ["FlatModel", "Output", "Spec", "TensorSpec", "build_model"]
