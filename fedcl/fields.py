"""What a client may send, field by field: names, types, shapes and bounds, declared once and judged before use.

Whatever comes from a client is data. :mod:`fedcl.messages` reads its form, :mod:`fedcl.server.validation` its values;
both go by the declarations here and by those that methods make of their own tensors (:class:`TensorField`).
"""

from __future__ import annotations

import re
import reprlib

CLIENT_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
CODE = re.compile(r"[A-Za-z0-9.+!_-]{1,64}")  # a version of fedcl
MAX_EXAMPLES = 1_000_000_000
MAX_TEXT = 500  # characters of a text that a person may read
_CUT = "..."
_shown = reprlib.Repr()
_shown.maxstring = _shown.maxother = 80


def clean(text: str, limit: int = MAX_TEXT) -> str:
    """Return ``text`` as one line of at most ``limit`` characters that any file and terminal takes.

    White space becomes single spaces; lone surrogates, control characters and marks that change the direction of text
    become their escapes.
    """
    cut = text[: limit + 1]
    if not cut.isprintable():
        cut = " ".join(cut.split())
        cut = "".join(c if c.isprintable() else _escape(c) for c in cut)
    return cut if len(cut) <= limit else cut[: limit - len(_CUT)] + _CUT


def _escape(character: str) -> str:
    return character.encode("unicode_escape", "surrogatepass").decode("ascii")


def shown(value: object) -> str:
    """Return a foreign value as a message may show it, however large and odd it is."""
    return clean(_shown.repr(value), 120)


def whole(value: object, name: str, highest: int = MAX_EXAMPLES) -> int:
    """Return ``value`` if it is an int in [0, ``highest``].

    Raises
    ------
    ValueError
        Naming the field: a bool or a float is no int, whatever its value.
    """
    if type(value) is not int or not 0 <= value <= highest:
        raise ValueError(f"{name} is {shown(value)}: must be a whole number (int) in [0, {highest}]")
    return value
