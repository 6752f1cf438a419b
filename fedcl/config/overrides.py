"""Overrides as they are typed: ``key=value`` in Hydra's grammar, and as plain text where that has no word for it.

Hydra knows few signs outside of quotes: no umlaut, no ``~``, no second ``=``. Where the meaning is plain all the same,
as in ``data.root=~/übung/a=b.npz``, the value is taken as it stands.
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, QuotedString
from hydra.errors import HydraException

from fedcl.config.value_rules import ConfigError, Rule, takes_text

_KEY = re.compile(r"\s*[+~]{0,2}[\w./-]+(?:@[\w.:]*)?\s*")
_OPENING = ("[", "{", "(", "'", '"')
_GROUPING = re.compile(r"[][(){}'\"]")
_ESCAPED = re.compile(r"\\[\s,:=(){}\[\]]")


@dataclass(frozen=True)
class Setting:
    """One value for one dotted key, and how it was written."""

    text: str
    key: str
    value: Any


def parse(text: str) -> Override:
    """Read one override.

    Raises
    ------
    ConfigError
        If it is not an override; the message has the quoted form that would be one.
    """
    parser = OverridesParser.create()
    key, sign, value = text.partition("=")
    plain = bool(sign) and _KEY.fullmatch(key) is not None and not value.strip().startswith(_OPENING)
    try:
        # `compare_with` holds overrides, which would not parse inside an override
        if not (plain and key.strip() == "compare_with" and "=" in value):
            return parser.parse_override(text)
    except (HydraException, ValueError, RecursionError) as error:
        if not sign or _KEY.fullmatch(key) is None:
            raise ConfigError(f"{text}: not an override; write key=value ({_why(error)})") from error
        if not plain:
            raise ConfigError(
                f"{text}: not an override; close what is opened, or for this text write {in_quotes(text)}"
            ) from error
    several = not _GROUPING.search(value) and key.strip() != "compare_with"
    pieces = value.split(",") if several else [value]
    return parser.parse_override(f"{key}={','.join(_quoted(piece.strip()) for piece in pieces)}")


def setting(override: Override, text: str, rule: Rule | None) -> Setting:
    """Return the value that an override gives to a key with this rule.

    What reads as something else, such as a number, is text where the rule takes text and not that: ``run_dir=123``.
    """
    value, raw = override.value(), text.partition("=")[2].strip()
    as_written = not isinstance(override._value, QuotedString) and takes_text(rule)
    if as_written and isinstance(value, (bool, int, float)) and rule is not None and not rule.accepts(value):
        value = raw
    elif as_written and isinstance(value, str) and "\\" in raw and not _ESCAPED.search(raw) and raw[:1] not in "'\"":
        value = raw  # Hydra halves some of the backslashes of a path of Windows
    return Setting(text, override.key_or_group, value)


def as_text(key: str, value: object) -> str:
    """Return the override that sets ``key`` to text, whatever signs are in it."""
    return f"{key}={_quoted(str(value))}"


def in_quotes(text: str) -> str:
    """Return an override as one types it in a shell if its value is text, whatever signs are in it."""
    key, _, value = text.partition("=")
    quoted = _quoted(value, quote='"')
    return shlex.quote(f"{key}={quoted}")


def _quoted(value: str, quote: str = "'") -> str:
    """Return text in quotes: there a backslash counts as itself, but for those right before a quote."""
    escaped = re.sub(rf"(\\*){quote}", lambda found: 2 * found[1] + "\\" + quote, value)
    trailing = len(escaped) - len(escaped.rstrip("\\"))
    return quote + escaped + trailing * "\\" + quote


def _why(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(line for line in lines if "hydra.cc" not in line)[:200]
