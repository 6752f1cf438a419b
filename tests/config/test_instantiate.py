"""Components inside components: only where the code asks for them, and under the same trust."""

from __future__ import annotations

from typing import Any

import pytest

from clients.unlearners.ssd import SSD
from clients.unlearners.wrappers import Guarded
from fedcl.config.compose import compose
from fedcl.config.instantiate import build
from fedcl.config.value_rules import ConfigError

INNER = {"_target_": "clients.unlearners.ssd.SSD", "alpha": 0.25}


def node(base: Any) -> dict[str, Any]:
    return {"_target_": "clients.unlearners.wrappers.Guarded", "base": base}


def test_a_parameter_that_the_class_names_is_built() -> None:
    found = build(node(INNER), at="unlearner")
    assert isinstance(found, Guarded)
    assert isinstance(found.base, SSD)
    assert found.base.alpha == 0.25


def test_components_nest() -> None:
    found = build(node(node(INNER)))
    assert isinstance(found.base.base, SSD)


def test_the_mapping_is_left_as_it_was() -> None:
    given = node(dict(INNER))
    build(given)
    assert given == node(INNER)


@pytest.mark.parametrize(
    ("base", "said"),
    [
        (
            {"_target_": "os.system", "command": "true"},
            "unlearner.base._target_=os.system: package 'os' is not trusted",
        ),
        ({"_target_": "fedcl.base.files.os.system"}, "unlearner.base._target_"),
        ({"alpha": 0.5}, "unlearner.base: has no _target_"),
        ("ssd", "unlearner.base=ssd: must be a mapping with a _target_"),
        ({**INNER, "alfa": 1}, "unlearner.base.alfa: no such parameter"),
    ],
)
def test_what_is_inside_is_held_to_the_same_rules(base: Any, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build(node(base), at="unlearner")
    assert said in str(caught.value)


@pytest.mark.parametrize(
    "override", ["unlearner.base.alpha=-1", "unlearner.base={_target_: clients.unlearners.ssd.SSD, alpha: -1}"]
)
def test_values_inside_are_held_to_the_rules_of_their_choice(override: str) -> None:
    with pytest.raises(ConfigError, match=r"unlearner.base.alpha=-1: must be number > 0"):
        compose(["unlearner=guarded_ssd", override])


def test_no_other_mapping_is_ever_built() -> None:
    """A class that does not ask for it gets the mapping as it stands, even one that names something dangerous."""
    inside = {"_target_": "os.system", "command": "true"}
    found = build({"_target_": "fedcl.contracts.requests.ErasureOutcome", "part": inside, "outcome": "none", "why": ""})
    assert found.part == inside
