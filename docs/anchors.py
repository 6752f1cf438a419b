"""Set the line numbers of the pointers in architecture.md: run it after code has moved.

python docs/anchors.py
"""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "architecture.md"
ANCHOR = re.compile(r"\[`(?P<file>[\w/.]+):(?P<line>\d+)`\]\((?P<link>[^)]+)\) `(?P<symbol>\w+)`")


def line_of(file: Path, symbol: str, near: int) -> int:
    """Return the line on which ``symbol`` is defined in ``file``: of several, the one closest to ``near``.

    Raises
    ------
    ValueError
        If ``file`` does not define it.
    """
    pattern = re.compile(rf"\s*(def|class) {symbol}\b")
    found = [number for number, text in enumerate(file.read_text().splitlines(), 1) if pattern.match(text)]
    if not found:
        raise ValueError(f"{file} does not define {symbol}")
    return min(found, key=lambda number: abs(number - near))


def corrected(text: str) -> str:
    """Return the page with each pointer at its definition."""

    def pointer(match: re.Match[str]) -> str:
        file, symbol = match["file"], match["symbol"]
        line = line_of(ROOT / file, symbol, int(match["line"]))
        return f"[`{file}:{line}`](../{file}#L{line}) `{symbol}`"

    return ANCHOR.sub(pointer, text)


if __name__ == "__main__":
    PAGE.write_text(corrected(PAGE.read_text()))
