"""Pieces of HTML. Whatever comes from a run is escaped here, and only here."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

_UNSEEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_REPLACED = "\N{REPLACEMENT CHARACTER}"


@dataclass(frozen=True)
class Cell:
    """A table's cell: its text, and the number that it is sorted by where it shows one."""

    text: str
    value: float | None = None


def esc(text: object) -> str:
    """Return text as HTML says it, in an attribute too.

    Control characters, and those that turn the direction of what follows, are shown as the replacement character.
    """
    return html.escape(_UNSEEN.sub(_REPLACED, str(text)), quote=True)


def section(name: str, title: str, *content: str) -> str:
    """Return a part of the page with its heading."""
    body = "\n".join(content)
    heading = f'<h2 id="{name}-title">{esc(title)}</h2>'
    return f'<section aria-labelledby="{name}-title" id="{name}">\n{heading}\n{body}\n</section>'


def paragraph(text: str) -> str:
    """Return a paragraph of plain text."""
    return f"<p>{esc(text)}</p>"


def details(summary: str, content: str) -> str:
    """Return what is shown on demand; ``content`` is HTML."""
    return f"<details><summary>{esc(summary)}</summary>\n{content}\n</details>"


def code(text: str, label: str) -> str:
    """Return a block of code that scrolls in its own box."""
    return f'<pre tabindex="0" aria-label="{esc(label)}"><code>{esc(text)}</code></pre>'


def pairs(rows: Iterable[tuple[str, object]]) -> str:
    """Return a list of names and values."""
    entries = "".join(f"<div><dt>{esc(name)}</dt><dd>{esc(value)}</dd></div>" for name, value in rows)
    return f'<dl class="pairs">{entries}</dl>'


def bullets(rows: Iterable[str]) -> str:
    """Return a list of plain texts."""
    return "<ul>" + "".join(f"<li>{esc(row)}</li>" for row in rows) + "</ul>"


def table(caption: str, columns: Sequence[str], rows: Iterable[Sequence[Cell | str]]) -> str:
    """Return a table that can be sorted by any column, in a box of its own that scrolls.

    A row's first cell is its header. A cell with a value is set to the right and sorted by it.
    """
    cells = [[Cell(cell) if isinstance(cell, str) else cell for cell in row] for row in rows]
    numbers = [any(row[i].value is not None for row in cells) for i in range(len(columns))]
    head = "".join(
        f'<th scope="col"{" class=number" * number}>{esc(column)}</th>'
        for column, number in zip(columns, numbers, strict=True)
    )
    body = "\n".join(f"<tr>{''.join(_cell(cell, i == 0) for i, cell in enumerate(row))}</tr>" for row in cells)
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{esc(caption)}">\n'
        f'<table class="sortable"><caption>{esc(caption)}</caption>\n'
        f"<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table>\n</div>"
    )


def _cell(cell: Cell, is_header: bool) -> str:
    value = "" if cell.value is None else f' class="number" data-value="{cell.value!r}"'
    tag, scope = ("th", ' scope="row"') if is_header else ("td", "")
    return f"<{tag}{scope}{value}>{esc(cell.text)}</{tag}>"
