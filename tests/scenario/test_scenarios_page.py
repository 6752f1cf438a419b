"""Every stream, schedule and preset stands on its page, with a command that works."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from fedcl.config.compose import compose, list_choices
from fedcl.runs.setup import Setup

PAGE = (Path(__file__).parents[2] / "docs" / "scenarios.md").read_text()
COMMANDS = sorted(set(re.findall(r"fedcl run [^`\n]+", PAGE)))


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_works(command: str) -> None:
    cfg = compose(shlex.split(command)[2:])
    if "experiment=" not in command:
        setup = Setup.of(cfg)
        assert setup.schedule.num_rounds >= setup.stream.num_tasks == cfg["scenario"]["num_tasks"]


@pytest.mark.parametrize("kind", ["scenario", "scenario/schedule"])
def test_each_choice_has_its_row_and_command(kind: str) -> None:
    for name, _ in list_choices(kind):
        assert f"| `{name}` |" in PAGE
        assert any(f"{kind}={name}" in command.split() for command in COMMANDS)


def test_each_preset_has_its_row() -> None:
    presets = [name for name, _ in list_choices("experiment") if name.startswith("spread_")]
    assert len(presets) == 4
    assert all(f"| `{name}` |" in PAGE for name in presets)
