"""What value rules are made of: each tells whether a value satisfies it, and what is wrong with one that does not."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

_MOST_BITS = 63
_NO_NAME = re.compile(r"[\x00-\x1f\x7f]")


@dataclass(frozen=True)
class Rule:
    """What one value may be; made by `parse_rule`."""

    text: str

    def accepts(self, value: Any) -> bool:
        """Whether `value` satisfies the rule."""
        return self.fault(value, "") is None

    def fault(self, value: Any, place: str) -> str | None:
        """Say what is wrong with `value`, by the dotted `place` of the part of it that is; None if nothing is."""
        return None if self._fits(value) else f"{place}={short(value)}: must be {self.text}"

    @property
    def parts(self) -> tuple[Rule, ...]:
        """The alternatives that the rule consists of."""
        return (self,)

    def _fits(self, value: Any) -> bool:
        return True  # any


@dataclass(frozen=True)
class Null(Rule):
    """Nothing."""

    def _fits(self, value: Any) -> bool:
        return value is None


@dataclass(frozen=True)
class Choice(Rule):
    """One of several values."""

    values: tuple[Any, ...]

    def _fits(self, value: Any) -> bool:
        return any(type(value) is type(choice) and value == choice for choice in self.values)


@dataclass(frozen=True)
class Scalar(Rule):
    """A bool, or text of some kind."""

    kind: str
    pattern: str = ""

    def _fits(self, value: Any) -> bool:
        if not isinstance(value, str):
            return self.kind == "bool" and isinstance(value, bool)
        if self.kind == "regex":
            return compiles(value)
        if self.kind == "path":
            return bool(value) and not _NO_NAME.search(value) and is_unicode(value)
        if self.kind == "str":
            return is_unicode(value) and (not self.pattern or re.fullmatch(self.pattern, value) is not None)
        return False


@dataclass(frozen=True)
class Number(Rule):
    """A number, or an int, of a range."""

    whole: bool
    low: float = -math.inf
    high: float = math.inf
    open_low: bool = False
    open_high: bool = False

    def fault(self, value: Any, place: str) -> str | None:
        """Say what is wrong; see `Rule`."""
        if self.whole and type(value) is int and value.bit_length() > _MOST_BITS:
            return f"{place}={short(value)}: must be {self.text}, of at most 64 bits"
        return super().fault(value, place)

    def _fits(self, value: Any) -> bool:
        if isinstance(value, bool) or not isinstance(value, int if self.whole else (int, float)):
            return False
        above = value > self.low if self.open_low else value >= self.low
        below = value < self.high if self.open_high else value <= self.high
        return above and below and abs(value) <= sys.float_info.max


@dataclass(frozen=True)
class ListOf(Rule):
    """A list whose members all satisfy one rule."""

    member: Rule
    least: int = 0
    most: float = math.inf

    def fault(self, value: Any, place: str) -> str | None:
        """Say what is wrong; see `Rule`."""
        if not isinstance(value, (list, tuple)) or not self.least <= len(value) <= self.most:
            return f"{place}={short(value)}: must be {self.text}"
        faults = (self.member.fault(one, f"{place}[{i}]") for i, one in enumerate(value))
        return next(filter(None, faults), None)


@dataclass(frozen=True)
class MappingOf(Rule):
    """A mapping with names of any kind, or, with ``fields``, with these; the others of them may be left out."""

    member: Rule | None = None
    fields: Mapping[str, Rule] = field(default_factory=dict)
    needed: frozenset[str] = frozenset()

    def fault(self, value: Any, place: str) -> str | None:
        """Say what is wrong; see `Rule`."""
        if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
            return f"{place}={short(value)}: must be {self.text}"
        if self.member is None and not self.needed <= value.keys() <= self.fields.keys():
            wrong = min(self.needed - value.keys(), default=None) or min(value.keys() - self.fields.keys())
            told = "is missing" if wrong in self.needed else "is not known here"
            return f"{place}={short(value)}: {wrong} {told}; must be {self.text}"
        faults = (
            (self.member or self.fields[name]).fault(one, f"{place}.{name}" if place else name)
            for name, one in value.items()
        )
        return next(filter(None, faults), None)


@dataclass(frozen=True)
class Either(Rule):
    """Any of several rules."""

    members: tuple[Rule, ...]

    @property
    def parts(self) -> tuple[Rule, ...]:
        """The alternatives that the rule consists of."""
        return tuple(part for member in self.members for part in member.parts)

    def fault(self, value: Any, place: str) -> str | None:
        """Say what is wrong, by the one alternative of the value's shape where there is one; see `Rule`."""
        if any(member.accepts(value) for member in self.members):
            return None
        shape = MappingOf if isinstance(value, Mapping) else ListOf if isinstance(value, (list, tuple)) else ()
        for member in self.parts:
            if shape and isinstance(member, shape) and value:
                return member.fault(value, place)
        return f"{place}={short(value)}: must be {self.text}"


def is_path(rule: Rule | None) -> bool:
    """Whether a rule lets a value name a file."""
    return rule is not None and any(isinstance(part, Scalar) and part.kind == "path" for part in rule.parts)


def takes_text(rule: Rule | None) -> bool:
    """Whether a rule takes free text."""
    return rule is not None and any(isinstance(part, Scalar) and part.kind != "bool" for part in rule.parts)


def show(value: Any) -> str:
    """Write a value as YAML would on one line."""
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)


def short(value: Any) -> str:
    """Write a value as `show`, cut where it is long."""
    if isinstance(value, int) and value.bit_length() > 200:
        return f"an int of {value.bit_length()} bits"  # Python writes no more than 4300 digits
    text = show(value)
    return text if len(text) <= 60 else text[:57] + "..."


def compiles(pattern: str) -> bool:
    """Whether text is a regular expression."""
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError):
        return False
    return is_unicode(pattern)


def is_unicode(text: str) -> bool:
    """Whether ``text`` can be written to a file: bytes of the command line that are no UTF-8 cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
