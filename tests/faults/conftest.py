from __future__ import annotations

from tests.server.conftest import build

__all__ = ["build"]
