"""What a value of a configuration may be: one line of a small grammar, checked without importing torch.

A rule is a list of allowed values, or text::

    rule   = part {" or " part}
    part   = ("int" | "number") [range]
           | "bool" | "null" | "any"
           | "str" ["like" 'PATTERN']             text; all of it matches the regular expression
           | "path"                               text that can name a file; ``~`` and ``$NAME`` are replaced
           | "regex"                              text that is a regular expression
           | 'TEXT'                               this text and no other
           | "list" ["[" least ".." [most] "]"] "of" part
           | "mapping of" part                    names that nobody knows beforehand
           | "{" name ["?"] ":" rule {"," ...} "}"    "?": may be left out
           | "(" rule ")"
    range  = (">=" | ">" | "<=" | "<") bound  |  "in" ("[" | "(") bound "," bound ("]" | ")")

No number is NaN or infinite, no bool is an int, and an int has at most 64 bits.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

_TOKEN = re.compile(
    r"""\s*(?:(?P<number>[-+]?(?:\d+(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d+)?)|(?P<word>[A-Za-z_]\w*)"""
    r"""|(?P<quoted>'[^']*'|"[^"]*")|(?P<sign>\.\.|>=|<=|[][(){},:?<>]))"""
)
_TYPES = {"bool": bool, "str": str, "path": str, "regex": str}
_MOST_BITS = 63
_NO_NAME = re.compile(r"[\x00-\x1f\x7f]")


class ConfigError(ValueError):
    """A setting that cannot be used. The message is one line and names the key, the value and what is allowed."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))


class RunFailed(RuntimeError):
    """A run that cannot go on, for a reason that one line tells: the command ends with status 1, not a traceback."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))


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
        if not isinstance(value, _TYPES[self.kind]):
            return False
        if self.kind == "regex":
            return _compiles(value)
        if self.kind == "path":
            return bool(value) and not _NO_NAME.search(value) and _is_unicode(value)
        if self.kind == "str":
            return _is_unicode(value) and (not self.pattern or re.fullmatch(self.pattern, value) is not None)
        return True


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


class _Reader:
    """Reads a rule's text from left to right."""

    def __init__(self, text: str) -> None:
        self.tokens: list[str] = []
        at = 0
        while text[at:].strip():
            match = _TOKEN.match(text, at)
            if match is None:
                raise ValueError(text[at:])
            self.tokens.append(match[match.lastgroup or 0])
            at = match.end()

    def took(self, *wanted: str) -> bool:
        """Take these tokens if they are the next ones."""
        if tuple(self.tokens[: len(wanted)]) != wanted:
            return False
        del self.tokens[: len(wanted)]
        return True

    def take(self, *allowed: str) -> str:
        """Take the next token, which must be one of ``allowed`` if there are any."""
        if not self.tokens or (allowed and self.tokens[0] not in allowed):
            raise ValueError(" ".join(self.tokens))
        return self.tokens.pop(0)

    def rule(self) -> Rule:
        parts = [self.part()]
        while self.took("or"):
            parts.append(self.part())
        return parts[0] if len(parts) == 1 else Either(" or ".join(part.text for part in parts), tuple(parts))

    def part(self) -> Rule:
        token = self.take()
        if token == "(":
            inner = self.rule()
            self.take(")")
            return inner
        if token in ("int", "number"):
            return self._number(token)
        if token == "list":
            return self._list()
        if token == "{":
            return self._fields()
        if token == "mapping":
            self.take("of")
            member = self.part()
            return MappingOf(f"mapping of {_grouped(member)}", member)
        if token[0] in "'\"":
            return Choice(token, (token[1:-1],))
        if token == "str" and self.took("like"):
            quoted = self.take()
            if quoted[0] not in "'\"" or not _compiles(quoted[1:-1]):
                raise ValueError(quoted)
            return Scalar(f"str like {quoted}", "str", quoted[1:-1])
        if token in _TYPES:
            return Scalar(token, token)
        if token not in ("any", "null"):
            raise ValueError(token)
        return Rule(token) if token == "any" else Null(token)

    def _number(self, kind: str) -> Rule:
        whole = kind == "int"
        if self.tokens[:1] and self.tokens[0] in (">=", ">", "<=", "<"):
            sign, bound = self.take(), self.take()
            text, limit = f"{kind} {sign} {bound}", float(bound)
            if sign.startswith(">"):
                return Number(text, whole, low=limit, open_low=sign == ">")
            return Number(text, whole, high=limit, open_high=sign == "<")
        if not self.took("in"):
            return Number(kind, whole)
        left, low, _, high, right = self.take("[", "("), self.take(), self.take(","), self.take(), self.take("]", ")")
        if float(low) > float(high):
            raise ValueError("an empty range; the first bound must not exceed the second")
        text = f"{kind} in {left}{low}, {high}{right}"
        return Number(text, whole, float(low), float(high), left == "(", right == ")")

    def _list(self) -> Rule:
        least, most, size = 0, math.inf, ""
        if self.took("["):
            lowest = self.take()
            self.take("..")
            highest = "" if self.tokens[:1] == ["]"] else self.take()
            self.take("]")
            least, most, size = int(lowest), int(highest) if highest else math.inf, f"[{lowest}..{highest}]"
        self.take("of")
        member = self.part()
        return ListOf(f"list{size} of {_grouped(member)}", member, least, most)

    def _fields(self) -> Rule:
        fields, needed, texts = {}, set(), []
        while True:
            name = self.take()
            optional = self.took("?")
            self.take(":")
            fields[name] = self.rule()
            texts.append(f"{name}{'?' * optional}: {fields[name].text}")
            if not optional:
                needed.add(name)
            if self.take(",", "}") == "}":
                return MappingOf(f"{{{', '.join(texts)}}}", None, fields, frozenset(needed))


def parse_rule(spec: object, key: str) -> Rule:
    """Read one rule; `key` is its dotted place, for the error message.

    Raises
    ------
    ConfigError
        If `spec` is not in the grammar of this module.
    """
    if isinstance(spec, Sequence) and not isinstance(spec, str):
        if spec and all(value is None or isinstance(value, (bool, int, float, str)) for value in spec):
            return Choice("one of " + ", ".join(show(value) for value in spec), tuple(spec))
    elif isinstance(spec, str):
        try:
            reader = _Reader(spec)
            rule = reader.rule()
            if not reader.tokens:
                return rule
        except ValueError as error:
            if str(error).startswith("an empty range"):
                raise ConfigError(f"{key}={spec}: {error}") from error
    raise ConfigError(
        f"{key}={spec}: not a rule; write like 'int >= 1', 'number in (0, 1]', 'str or null', 'list[1..] of int', or a "
        "list of values"
    )


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


def _grouped(rule: Rule) -> str:
    return rule.text if len(rule.parts) == 1 else f"({rule.text})"


def _compiles(pattern: str) -> bool:
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError):
        return False
    return _is_unicode(pattern)


def _is_unicode(text: str) -> bool:
    """Whether ``text`` can be written to a file: bytes of the command line that are no UTF-8 cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
