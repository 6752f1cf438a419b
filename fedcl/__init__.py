"""fedcl: federated models that live long: new tasks, late devices, and data to be forgotten."""

from __future__ import annotations

__version__ = "0.1.0"
