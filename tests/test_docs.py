"""The documentation's pointers into the code, and its commands, are true."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
_spec = importlib.util.spec_from_file_location("anchors", ROOT / "docs" / "anchors.py")
assert _spec is not None
assert _spec.loader is not None
anchors = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(anchors)


def test_each_pointer_of_the_architecture_page_is_at_its_definition() -> None:
    page = anchors.PAGE.read_text()
    assert len(anchors.ANCHOR.findall(page)) >= 12
    assert anchors.corrected(page) == page, "run python docs/anchors.py"


def test_a_pointer_to_nothing_is_an_error() -> None:
    with pytest.raises(ValueError, match="does not define no_such_name"):
        anchors.line_of(ROOT / "fedcl" / "cli.py", "no_such_name", 1)


def test_local_links_lead_somewhere() -> None:
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]:
        for target in re.findall(r"\]\((?!https?://|#)([^)#\s]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.relative_to(ROOT)} links to {target}"
