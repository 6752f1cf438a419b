"""The rules of a configuration file: what each value may be, said in the YAML, checked without importing torch.

Beside the parameters of a mapping stands ``_allowed_``: parameter name -> rule. A rule is a list of allowed values, or
one line of this grammar::

    rule  = kind [range] [" or null"]
    kind  = int | number | bool | str | any
    range = (>= | > | <= | <) bound  |  in ("[" | "(") bound "," bound ("]" | ")")

A value without a rule must have the type of its default; a null default without a rule takes anything.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

RULES_KEY = "_allowed_"
MISSING = "???"  # a value that the user must give

_NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
_GRAMMAR = re.compile(
    rf"(?P<kind>int|number|bool|str|any)"
    rf"(?:\s*(?P<op>>=|>|<=|<)\s*(?P<bound>{_NUMBER})"
    rf"|\s+in\s*(?P<left>[\[(])\s*(?P<low>{_NUMBER})\s*,\s*(?P<high>{_NUMBER})\s*(?P<right>[\])]))?"
    rf"(?P<null>\s+or\s+null)?"
)


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
    kind: str
    nullable: bool = False
    low: float = -math.inf
    high: float = math.inf
    open_low: bool = False
    open_high: bool = False
    values: tuple[Any, ...] = ()

    def accepts(self, value: Any) -> bool:
        """Whether `value` satisfies the rule. A bool is not an int, and no number is NaN or infinite."""
        if value is None:
            return self.nullable or self.kind == "any" or (self.kind == "enum" and None in self.values)
        if self.kind == "enum":
            return any(type(value) is type(choice) and value == choice for choice in self.values)
        if self.kind in ("bool", "str"):
            return isinstance(value, bool if self.kind == "bool" else str)
        if self.kind == "any":
            return True
        if isinstance(value, bool) or not isinstance(value, int if self.kind == "int" else (int, float)):
            return False
        above = value > self.low if self.open_low else value >= self.low
        below = value < self.high if self.open_high else value <= self.high
        return math.isfinite(value) and above and below


def parse_rule(spec: object, key: str) -> Rule:
    """Read one rule; `key` is its dotted place, for the error message.

    Raises
    ------
    ConfigError
        If `spec` is not in the grammar of this module.
    """
    if (
        isinstance(spec, (list, tuple))
        and spec
        and all(v is None or isinstance(v, (bool, int, float, str)) for v in spec)
    ):
        return Rule(text="one of " + ", ".join(show(value) for value in spec), kind="enum", values=tuple(spec))
    match = _GRAMMAR.fullmatch(spec.strip()) if isinstance(spec, str) else None
    if match is None or (match["kind"] not in ("int", "number") and (match["op"] or match["left"])):
        raise ConfigError(
            f"{key}={spec}: not a rule; write like 'int >= 1', 'number in (0, 1]', 'str or null', or a list of values"
        )
    low, high, open_low, open_high = -math.inf, math.inf, False, False
    if match["left"]:
        low, high = float(match["low"]), float(match["high"])
        open_low, open_high = match["left"] == "(", match["right"] == ")"
    elif match["op"] in (">", ">="):
        low, open_low = float(match["bound"]), match["op"] == ">"
    elif match["op"]:
        high, open_high = float(match["bound"]), match["op"] == "<"
    if low > high:
        raise ConfigError(f"{key}={spec}: an empty range; the first bound must not exceed the second")
    return Rule(" ".join(str(spec).split()), match["kind"], match["null"] is not None, low, high, open_low, open_high)


def show(value: Any) -> str:
    """Write a value as YAML would on one line."""
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)


def conform(node: Mapping[str, Any], default: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    """Check `node` against the rules and the types of `default`, key by key, and return it without its rules.

    Parameters
    ----------
    node
        The mapping to check.
    default
        The same mapping as the YAML files alone give it; an empty mapping leaves the keys free.
    path
        The dotted place of `node`, for messages.

    Returns
    -------
    dict
        `node` with every ``_allowed_`` removed and integers made floats where the default is a float.

    Raises
    ------
    ConfigError
        For an unknown key, a value against its rule or of another type than its default, and a malformed rule.
    """
    rules = _rules_of(default, path)
    free = not default.keys() - {RULES_KEY}
    checked: dict[str, Any] = {}
    for key, value in node.items():
        if key == RULES_KEY:
            continue
        place = f"{path}.{key}" if path else str(key)
        if not free and key not in default:
            raise ConfigError(f"{place}={_short(value)}: no such key; known here: {', '.join(_names(default))}")
        checked[key] = _conform_value(value, default.get(key), rules.get(key), place)
    return checked


def _rules_of(default: Mapping[str, Any], path: str) -> dict[str, Rule]:
    place = f"{path}.{RULES_KEY}" if path else RULES_KEY
    written = default.get(RULES_KEY, {})
    if not isinstance(written, Mapping):
        raise ConfigError(f"{place}={written}: must be a mapping from parameter name to rule")
    for name in written:
        if name not in default:
            raise ConfigError(f"{place}.{name}: no such parameter here; known: {', '.join(_names(default))}")
    return {name: parse_rule(spec, f"{place}.{name}") for name, spec in written.items()}


def _conform_value(value: Any, default: Any, rule: Rule | None, place: str) -> Any:
    if rule is not None:
        if not rule.accepts(value):
            raise ConfigError(f"{place}={_short(value)}: must be {rule.text}")
    elif default is not None and default != MISSING and not _same_type(value, default):
        raise ConfigError(f"{place}={_short(value)}: must be {_type_name(default)}")
    if isinstance(value, Mapping):
        return conform(value, default if isinstance(default, Mapping) else {}, place)
    if isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    return value


def _same_type(value: Any, default: Any) -> bool:
    if isinstance(default, bool) or isinstance(value, bool):
        return isinstance(default, bool) and isinstance(value, bool)
    if isinstance(default, float):
        return isinstance(value, (int, float)) and math.isfinite(value)
    return isinstance(value, type(default))


def _type_name(default: Any) -> str:
    names = {bool: "bool", int: "int", float: "a finite number", str: "str", list: "a list", dict: "a mapping"}
    return names.get(type(default), type(default).__name__)


def _names(node: Mapping[str, Any]) -> list[str]:
    return sorted(str(key) for key in node if key != RULES_KEY)


def _short(value: Any) -> str:
    text = show(value)
    return text if len(text) <= 60 else text[:57] + "..."
