"""A configuration against its rules and types, key by key.

Beside the parameters of a mapping stands ``_allowed_``: parameter name -> rule (`fedcl.config.value_rules`). A value
without a rule must have the type of its default; a null default without a rule takes anything. ``_refuses_`` and
``_warns_`` stand beside them too and tell which settings do not go together (`fedcl.config.pairs`).
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from typing import Any

from fedcl.config.value_rules import ConfigError, Rule, is_path, parse_rule, short

RULES_KEY = "_allowed_"
REFUSES_KEY, WARNS_KEY = "_refuses_", "_warns_"
SPECIAL = frozenset({RULES_KEY, REFUSES_KEY, WARNS_KEY})
MISSING = "???"  # a value that the user must give


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
        `node` without rules, with integers made floats where the default is a float, and with ``~`` and ``$NAME``
        replaced in paths.

    Raises
    ------
    ConfigError
        For an unknown key, a value against its rule or of another type than its default, and a malformed rule.
    """
    rules = rules_of(default, path)
    free = not default.keys() - SPECIAL
    checked: dict[str, Any] = {}
    for key, value in node.items():
        if key in SPECIAL:
            continue
        place = f"{path}.{key}" if path else str(key)
        if not free and key not in default:
            raise ConfigError(f"{place}={short(value)}: no such key; known here: {', '.join(_names(default))}")
        checked[key] = _conform_value(value, default.get(key), rules.get(key), place)
    return checked


def rules_of(default: Mapping[str, Any], path: str = "") -> dict[str, Rule]:
    """Return the rules that stand in a mapping, by parameter; ConfigError for a malformed one."""
    place = f"{path}.{RULES_KEY}" if path else RULES_KEY
    written = default.get(RULES_KEY, {})
    if not isinstance(written, Mapping):
        raise ConfigError(f"{place}={written}: must be a mapping from parameter name to rule")
    for name in written:
        if name not in default:
            raise ConfigError(f"{place}.{name}: no such parameter here; known: {', '.join(_names(default))}")
    return {name: parse_rule(spec, f"{place}.{name}") for name, spec in written.items()}


def rule_at(default: Mapping[str, Any], key: str) -> Rule | None:
    """Return the rule of a dotted key, None if it has none."""
    *parents, name = key.split(".")
    node: Any = default
    for parent in parents:
        node = node.get(parent) if isinstance(node, Mapping) else None
    return rules_of(node, ".".join(parents)).get(name) if isinstance(node, Mapping) else None


def is_key(place: str, schema: Mapping[str, Any]) -> bool:
    """Whether a setting may have the dotted key ``place``: one of the schema's, or below one with free names."""
    node: Any = schema
    parts = place.split(".")
    for i, part in enumerate(parts):
        if not isinstance(node, Mapping) or part not in node or part in SPECIAL:
            return i > 0 and rule_at(schema, ".".join(parts[:i])) is not None  # names that are not known in advance
        node = node[part]
    return True


def _conform_value(value: Any, default: Any, rule: Rule | None, place: str) -> Any:
    if rule is not None:
        fault = rule.fault(value, place)
        if fault is not None:
            raise ConfigError(fault)
        if is_path(rule) and isinstance(value, str):
            return os.path.expandvars(os.path.expanduser(value))
    elif default is not None and default != MISSING and not _same_type(value, default):
        raise ConfigError(f"{place}={short(value)}: must be {_type_name(default)}")
    elif isinstance(value, Mapping):
        return conform(value, default if isinstance(default, Mapping) else {}, place)
    if isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    return value


def _same_type(value: Any, default: Any) -> bool:
    if isinstance(default, bool) or isinstance(value, bool):
        return isinstance(default, bool) and isinstance(value, bool)
    if isinstance(default, float):
        return isinstance(value, (int, float)) and abs(value) < math.inf
    return isinstance(value, type(default))


def _type_name(default: Any) -> str:
    names = {bool: "bool", int: "int", float: "a finite number", str: "str", list: "a list", dict: "a mapping"}
    return names.get(type(default), type(default).__name__)


def _names(node: Mapping[str, Any]) -> list[str]:
    return sorted(str(key) for key in node if key not in SPECIAL)
