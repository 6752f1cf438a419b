"""``report.html``: a run as one self-contained page that opens from disk, light and dark, on a phone and on paper."""

from __future__ import annotations

from fedcl.results.html.page import write

__all__ = ["write"]
