"""The rules of fedcl's own YAML files, by component.

A user's own YAML file may name a component of fedcl's and state no rules. Its values are then checked by the rules that
stand beside the same component in the shipped files: a misspelt text would otherwise select another behaviour.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from fedcl.config.conform import RULES_KEY, SPECIAL
from fedcl.config.instantiate import TARGET_KEY


def with_rules(node: Mapping[str, Any], shipped: Path) -> dict[str, Any]:
    """Return ``node`` with the rules of the YAML files below ``shipped`` where it has none of its own."""
    full = {
        key: with_rules(value, shipped) if isinstance(value, Mapping) and key not in SPECIAL else value
        for key, value in node.items()
    }
    known = _rules(shipped).get(str(node.get(TARGET_KEY)), {})
    rules = {name: rule for name, rule in known.items() if name in node} | dict(node.get(RULES_KEY) or {})
    return {**full, RULES_KEY: rules} if rules else full


@functools.cache
def _rules(shipped: Path) -> dict[str, dict[str, Any]]:
    """Return the rules of each component's parameters; where files differ, what one of them allows is allowed."""
    found: dict[str, dict[str, list[Any]]] = {}
    for file in sorted(shipped.rglob("*.yaml")):
        for node in _components(yaml.safe_load(file.read_text(encoding="utf-8"))):
            rules = found.setdefault(node[TARGET_KEY], {})
            for name, rule in node[RULES_KEY].items():
                if rule not in rules.setdefault(name, []):
                    rules[name].append(rule)
    return {target: {name: _either(kinds) for name, kinds in rules.items()} for target, rules in found.items()}


def _components(node: Any) -> Iterator[Mapping[str, Any]]:
    if isinstance(node, Mapping):
        if TARGET_KEY in node and RULES_KEY in node:
            yield node
        for value in node.values():
            yield from _components(value)


def _either(kinds: list[Any]) -> Any:
    if len(kinds) == 1:
        return kinds[0]
    return " or ".join(" or ".join(f"'{text}'" for text in kind) if isinstance(kind, list) else kind for kind in kinds)
