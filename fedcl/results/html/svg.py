"""A figure as SVG within a page: in the page's colours, with ids of its own and without external addresses."""

from __future__ import annotations

import re
from dataclasses import dataclass

from markupsafe import Markup

from fedcl.results.figures.style import GREY, GRID, INK, MISSING, ON_DARK, ON_LIGHT, PALETTE

VARIABLES = {INK: "ink", GREY: "muted", GRID: "grid"} | {colour: f"c{i}" for i, colour in enumerate(PALETTE)}
"""Colour in the file -> name of the page's variable that replaces it."""
_FIXED = {colour.lower() for colour in (ON_LIGHT, ON_DARK, MISSING)}
_NAMES = {colour.lower(): name for colour, name in VARIABLES.items()}
_DROPPED = re.compile(r"<metadata>.*?</metadata>|<style[^>]*>.*?</style>|<!--.*?-->", re.DOTALL)
_ROOT = re.compile(r'<svg[^>]*?viewBox="0 0 ([\d.]+) ([\d.]+)"[^>]*>')
_ID = re.compile(r'\bid="([^"]*)"')
_LINK = re.compile(r'(?:xlink:)?href="#([^"]*)"|url\(#([^)]*)\)')
_COLOUR = re.compile(r"\b(fill|stroke): (#[0-9a-f]{6})")
_SPACE = re.compile(r" *\n\s*")
_DATA = re.compile(r'href="data:[^"]*"')


@dataclass(frozen=True)
class Picture:
    """The viewBox and the width in pixels of an SVG element, and everything after its opening tag."""

    box: str
    pixels: int
    body: Markup


def inline(file: str, name: str) -> Picture:
    """Return an SVG file as an element of a page.

    Parameters
    ----------
    file
        The file's text, as matplotlib wrote it.
    name
        The figure's name: its ids begin with it.

    Raises
    ------
    ValueError
        If it is not an SVG file as matplotlib writes it.
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
    width, height = float(root[1]), float(root[2])  # in points
    return Picture(f"0 0 {width:g} {height:g}", round(width * 4 / 3), Markup(_SPACE.sub(" ", body)))


def _themed(match: re.Match[str]) -> str:
    where, colour = match[1], match[2]
    if colour in _FIXED:
        return match[0]
    if colour in _NAMES:
        return f"{where}: var(--{_NAMES[colour]})"
    return f"{where}: color-mix(in srgb, {colour} var(--keep), white)"
