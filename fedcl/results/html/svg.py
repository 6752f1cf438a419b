"""A figure as SVG inside of a page: in the page's colours, with ids of its own, and no word of other addresses."""

from __future__ import annotations

import re

from fedcl.results.figures.style import GREY, GRID, INK, MISSING, ON_DARK, ON_LIGHT, PALETTE
from fedcl.results.html.elements import esc

VARIABLES = {INK: "ink", GREY: "muted", GRID: "grid"} | {colour: f"c{i}" for i, colour in enumerate(PALETTE)}
"""Colour in the file -> name of the page's variable that takes its place."""
_FIXED = {colour.lower() for colour in (ON_LIGHT, ON_DARK, MISSING)}
_NAMES = {colour.lower(): name for colour, name in VARIABLES.items()}
_DROPPED = re.compile(r"<metadata>.*?</metadata>|<style[^>]*>.*?</style>|<!--.*?-->", re.DOTALL)
_ROOT = re.compile(r'<svg[^>]*?viewBox="0 0 ([\d.]+) ([\d.]+)"[^>]*>')
_ID = re.compile(r'\bid="([^"]*)"')
_LINK = re.compile(r'(?:xlink:)?href="#([^"]*)"|url\(#([^)]*)\)')
_COLOUR = re.compile(r"\b(fill|stroke): (#[0-9a-f]{6})")
_SPACE = re.compile(r" *\n\s*")
_DATA = re.compile(r'href="data:[^"]*"')


def inline(file: str, name: str, text: str) -> str:
    """Return the SVG ``file`` as an element of a page.

    Parameters
    ----------
    file
        What matplotlib wrote.
    name
        Of the figure: its ids begin with it.
    text
        What the figure shows, for those who cannot see it.

    Raises
    ------
    ValueError
        If it is no SVG file of matplotlib's.
    """
    root = _ROOT.search(file)
    if root is None:
        raise ValueError(f"{name}: not an SVG file as matplotlib writes it")
    body = _DROPPED.sub("", file[root.end() :])
    ids = {old: f"{name}-{i}" for i, old in enumerate(dict.fromkeys(_ID.findall(body)))}
    linked = {match[1] or match[2] for match in _LINK.finditer(body)}
    # only what is linked needs an id
    body = _ID.sub(lambda match: f'id="{ids[match[1]]}"' if match[1] in linked else "", body)
    body = _LINK.sub(
        lambda match: f'href="#{ids[match[1]]}"' if match[1] is not None else f"url(#{ids[match[2]]})", body
    )
    body = _DATA.sub(lambda match: "".join(match[0].split()), _COLOUR.sub(_themed, body).replace("xlink:href", "href"))
    width, height = float(root[1]), float(root[2])
    pixels = width * 4 / 3  # of a point
    return (
        f'<svg role="img" aria-label="{esc(text)}" viewBox="0 0 {width:g} {height:g}" '
        f'style="max-width: {pixels:.0f}px; min-width: min({pixels:.0f}px, 30rem)">{_SPACE.sub(" ", body)}'
    )


def _themed(match: re.Match[str]) -> str:
    where, colour = match[1], match[2]
    if colour in _FIXED:
        return match[0]
    if colour in _NAMES:
        return f"{where}: var(--{_NAMES[colour]})"
    return f"{where}: color-mix(in srgb, {colour} var(--keep), white)"
