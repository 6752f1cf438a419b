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
           | "mapping of" part                    names that are not known in advance
           | "{" name ["?"] ":" rule {"," ...} "}"    "?": may be left out
           | "(" rule ")"
    range  = (">=" | ">" | "<=" | "<") bound  |  "in" ("[" | "(") bound "," bound ("]" | ")")

No number is NaN or infinite, no bool is an int, and an int has at most 64 bits.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from fedcl.config.rule_kinds import (
    Choice,
    Either,
    ListOf,
    MappingOf,
    Null,
    Number,
    Rule,
    Scalar,
    compiles,
    is_path,
    short,
    show,
    takes_text,
)

__all__ = ["ConfigError", "Rule", "is_path", "parse_rule", "short", "show", "takes_text"]

_TOKEN = re.compile(
    r"""\s*(?:(?P<number>[-+]?(?:\d+(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d+)?)|(?P<word>[A-Za-z_]\w*)"""
    r"""|(?P<quoted>'[^']*'|"[^"]*")|(?P<sign>\.\.|>=|<=|[][(){},:?<>]))"""
)
_SCALARS = ("bool", "str", "path", "regex")


class ConfigError(ValueError):
    """A setting that cannot be used. The message is one line and names the key, the value and what is allowed."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))


class RunFailed(RuntimeError):
    """A run that cannot continue, for a reason that fits on one line: the command exits with 1, without a traceback."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))


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
            if quoted[0] not in "'\"" or not compiles(quoted[1:-1]):
                raise ValueError(quoted)
            return Scalar(f"str like {quoted}", "str", quoted[1:-1])
        if token in _SCALARS:
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


def _grouped(rule: Rule) -> str:
    return rule.text if len(rule.parts) == 1 else f"({rule.text})"
