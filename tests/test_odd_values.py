"""Every key of every YAML has a rule, and an odd value of it is taken or refused in one line, never a traceback."""

from __future__ import annotations

import functools
import random
from collections.abc import Iterator, Mapping
from itertools import zip_longest
from pathlib import Path
from typing import Any

import pytest
import torch

import fedcl.config.compose as config
from fedcl.config.choices import groups_in
from fedcl.config.compose import ConfigError, compose, kinds, list_choices
from fedcl.config.conform import SPECIAL, rules_of
from fedcl.config.overrides import Setting, parse
from fedcl.runs.experiment import check
from tests.toy import PARTS, Choices, label, missing, overrides_of, write_files

ODD = ["nan", "inf", "-1", "0", "1" + 30 * "0", "true", "''", "x", "[]", "[nan]", "{}", "[{id: 1}]", "null", "😀",
       "1e-320", "-0.0", "9223372036854775808", "[[]]"]  # fmt: skip
GROUPS = {group: [name for name, _ in list_choices(group)] for group in kinds() if group != "experiment"}
ALONE: list[Choices] = [{group: name} for group, names in GROUPS.items() for name in names]
STOCK: list[Choices] = [{"strategy": name} for name in GROUPS["strategy"] if name != "pipeline"]
# every choice is in one of them: composing takes longer than looking
TOGETHER: list[Choices] = STOCK + [
    {group: name for group, name in zip(GROUPS, row, strict=True) if name is not None and group != "strategy"}
    for row in zip_longest(*GROUPS.values())
]


@functools.cache
def _schema(choices: tuple[str, ...]) -> Mapping[str, Any]:
    return config._schema((Path(config.CONFIG_DIR),), choices)


def schema_of(choices: Choices) -> Mapping[str, Any]:
    return _schema(tuple(f"{group}={name}" for group, name in choices.items()))


def keys_of(node: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, str | None]]:
    """Yield every key and the text of its rule; a mapping that has one is one key."""
    rules = rules_of(node, path)
    for key, value in node.items():
        place = f"{path}.{key}" if path else key
        if key in SPECIAL:
            continue
        if isinstance(value, Mapping) and key not in rules:
            yield from keys_of(value, place)
        else:
            yield place, rules[key].text if key in rules else None


@pytest.mark.parametrize("choices", TOGETHER, ids=lambda choices: f"{len(choices)}-{label(choices)[:40]}")
def test_every_key_has_a_rule(choices: Choices) -> None:
    found = dict(keys_of(schema_of(choices)))
    assert len(found) > 50
    assert [key for key, rule in found.items() if rule in (None, "any") and not key.endswith("._target_")] == []


def own_keys(choices: Choices) -> list[str]:
    """Return the keys that the file of one choice brings; of none, those that belong to no group."""
    places = tuple(group.replace("/", ".") + "." for group in (choices or GROUPS))
    below = [group for group in GROUPS if any(group.startswith(f"{parent}/") for parent in choices)]
    deeper = tuple(group.replace("/", ".") + "." for group in below)
    keys = [key for key, _ in keys_of(schema_of(choices)) if key.startswith(places) == bool(choices)]
    return [key for key in keys if not deeper or not key.startswith(deeper)]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return write_files(tmp_path_factory.mktemp("toy"))


def refusal(choices: Choices, key: str, value: str, files: dict[str, str]) -> str | None:
    """Return the line by which a run with ``key=value`` is refused before it begins, None if it is taken."""
    settings = [*overrides_of(choices, files, torch.device("cpu"), num_tasks=2), f"{key}={value}"]
    try:
        check(compose(settings), settings, ())
    except ConfigError as error:
        return str(error)
    return None


def judge(choices: Choices, key: str, value: str, refused: str | None) -> None:
    if refused is not None and not refused.startswith(f"{label(choices)}: needs the package"):
        assert key.split(".")[-1] in refused, f"{label(choices)} {key}={value}: {refused}"
        assert "\n" not in refused


def sample(count: int) -> list[tuple[Choices, str]]:
    draws = random.Random(0)
    return [({group: (name := draws.choice(GROUPS[group]))}, f"{group}={name}") for group in [*GROUPS, *GROUPS][:count]]


@pytest.mark.parametrize(("choices", "name"), sample(15), ids=lambda value: value if isinstance(value, str) else "")
def test_an_odd_value_is_taken_or_refused_in_one_line(choices: Choices, name: str, files: dict[str, str]) -> None:
    if why := missing(name):
        pytest.skip(why)
    draws = random.Random(name)
    keys = own_keys(choices) or own_keys({})
    for _ in range(2):
        key, value = draws.choice(keys), draws.choice(ODD)
        judge(choices, key, value, refusal(choices, key, value, files))


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("choices", [{}, *ALONE], ids=lambda choices: label(choices) or "root")
def test_every_odd_value_of_every_key(choices: Choices, files: dict[str, str]) -> None:
    if choices and (why := missing(label(choices))):
        pytest.skip(why)
    schema = schema_of(choices)
    for key in own_keys(choices):
        for value in ODD:
            text = f"{key}={value}"
            # what the rules refuse is told by them alone; the rest has to be put together
            told = config._misfit(config._read(Setting(text, key, parse(text)), schema), schema, GROUPS_OF_FILES)
            judge(choices, key, value, told or refusal(choices, key, value, files))


GROUPS_OF_FILES = groups_in((Path(config.CONFIG_DIR),))
assert set(PARTS) <= GROUPS.keys()
