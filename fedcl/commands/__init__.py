"""The commands: their words, and what they do; heavy libraries are imported only by those that need them."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from fedcl.commands import inspecting, running

if TYPE_CHECKING:
    Commands = argparse._SubParsersAction[argparse.ArgumentParser]


def add(commands: Commands, configs: argparse.ArgumentParser, quiet: argparse.ArgumentParser) -> None:
    """Add every command; ``configs`` and ``quiet`` are the parents that bring ``--config-dir`` and ``--quiet``."""
    running.add(commands, configs, quiet)
    inspecting.add(commands, configs)
