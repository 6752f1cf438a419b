"""Settings that do not go together, as the YAML files say: ``_refuses_`` stops a run, ``_warns_`` prints a warning.

Both stand beside the parameters of a mapping, in the file of the choice that knows. Each is a list of entries::

    _warns_:
      - when: {client.optimizer.momentum: number > 0, .mode: [online]}
        why: what goes wrong, and what to set

``when`` holds if each key is there and its value satisfies the rule (`fedcl.config.value_rules`). A key that begins
with a dot is beside the list. The first key is the one that the message names.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fedcl.config.conform import REFUSES_KEY, SPECIAL, WARNS_KEY
from fedcl.config.value_rules import ConfigError, parse_rule, short

_ABSENT = object()


def check_pairs(cfg: Mapping[str, Any], schema: Mapping[str, Any]) -> list[str]:
    """Return the warnings of a configuration; its ``schema`` has the rules.

    Raises
    ------
    ConfigError
        At the first pair that is refused, and for a malformed entry.
    """
    for key in (REFUSES_KEY, WARNS_KEY):
        found = [text for place, entries in _lists(schema, key) for text in _seen(entries, cfg, place, key)]
        if found and key == REFUSES_KEY:
            raise ConfigError(found[0])
    return found


def _lists(node: Mapping[str, Any], key: str, path: str = "") -> Iterator[tuple[str, Any]]:
    if key in node:
        yield path, node[key]
    for name, value in node.items():
        if name not in SPECIAL and isinstance(value, Mapping):
            yield from _lists(value, key, f"{path}.{name}" if path else str(name))


def _seen(entries: Any, cfg: Mapping[str, Any], path: str, key: str) -> Iterator[str]:
    place = f"{path}.{key}" if path else key
    if not isinstance(entries, Sequence) or isinstance(entries, str):
        raise ConfigError(f"{place}: must be a list of {{when, why}}")
    for i, entry in enumerate(entries):
        if not isinstance(entry, Mapping) or entry.keys() != {"when", "why"} or not isinstance(entry["when"], Mapping):
            raise ConfigError(f"{place}[{i}]={short(entry)}: must have when, a mapping from key to rule, and why")
        rules = {
            f"{path}{name}" if name.startswith(".") else name: parse_rule(rule, f"{place}[{i}].{name}")
            for name, rule in entry["when"].items()
        }
        values = {name: _value(cfg, name) for name in rules}
        if rules and all(value is not _ABSENT and rules[name].accepts(value) for name, value in values.items()):
            first, *others = (f"{name}={short(value)}" for name, value in values.items())
            beside = f" with {', '.join(others)}" if others else ""
            whose = f" ({path})" if path and not any(name.startswith(path) for name in rules) else ""
            yield f"{first}{beside}{whose}: {entry['why']}"


def _value(cfg: Any, key: str) -> Any:
    for part in key.split("."):
        if not isinstance(cfg, Mapping) or part not in cfg:
            return _ABSENT
        cfg = cfg[part]
    return cfg
