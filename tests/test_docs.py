"""The documentation's pointers into the code, and its commands, are true."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ANCHOR = re.compile(r"\[`(?P<file>[\w/.]+):(?P<line>\d+)`\]\((?P<link>[^)]+)\) `(?P<symbol>\w+)`")


def _anchors() -> list[re.Match[str]]:
    return list(ANCHOR.finditer((ROOT / "docs" / "architecture.md").read_text()))


def test_there_is_an_anchor_for_each_step() -> None:
    assert len(_anchors()) >= 12


@pytest.mark.parametrize("match", _anchors(), ids=lambda match: match["symbol"])
def test_each_anchor_points_at_its_definition(match: re.Match[str]) -> None:
    file, line, symbol = ROOT / match["file"], int(match["line"]), match["symbol"]
    lines = file.read_text().splitlines()
    pattern = re.compile(rf"\s*(def|class) {symbol}\b")
    found = [number for number, text in enumerate(lines, 1) if pattern.match(text)]
    assert line in found, f"docs/architecture.md: {symbol} stands at {match['file']}:{found}, not at line {line}"
    assert match["link"] == f"../{match['file']}#L{line}"


def test_local_links_lead_somewhere() -> None:
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]:
        for target in re.findall(r"\]\((?!https?://|#)([^)#\s]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.relative_to(ROOT)} links to {target}"
