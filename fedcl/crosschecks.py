"""What the values of a configuration must be to each other, as far as the YAML alone tells."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from fedcl.rules import ConfigError

_SAFE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def cross_check(cfg: Mapping[str, Any]) -> None:
    """Run every check of this file over a configuration; raises ConfigError at the first that fails."""
    for check in CHECKS:
        check(cfg)


def _name_is_safe(cfg: Mapping[str, Any]) -> None:
    # The name becomes part of a folder's: no path separators, no leading dot.
    if not _SAFE_NAME.fullmatch(cfg["name"]):
        raise ConfigError(f"name={cfg['name']}: must be letters, digits, '.', '_', '-', and not start with a sign")


def _selection_fits(cfg: Mapping[str, Any]) -> None:
    clients, chosen = cfg["num_clients"], cfg["clients_per_round"]
    if chosen is not None and chosen > clients:
        raise ConfigError(f"clients_per_round={chosen}: must be <= num_clients={clients}")
    most = clients if chosen is None else chosen
    if cfg["min_replies"] > most:
        raise ConfigError(f"min_replies={cfg['min_replies']}: must be <= {most}, the clients of a round")


def _rounds_fit_tasks(cfg: Mapping[str, Any]) -> None:
    rounds = cfg["rounds_per_task"]
    numbers = rounds if isinstance(rounds, list) else [rounds]
    if not numbers or any(isinstance(number, bool) or not isinstance(number, int) or number < 1 for number in numbers):
        raise ConfigError(f"rounds_per_task={rounds}: must be int >= 1, or a list of them, one for each task")
    tasks = cfg["scenario"].get("num_tasks") if isinstance(cfg.get("scenario"), Mapping) else None
    if isinstance(rounds, list) and isinstance(tasks, int) and len(rounds) != tasks:
        raise ConfigError(f"rounds_per_task={rounds}: has {len(rounds)} numbers for scenario.num_tasks={tasks}")


def _exclude_names(cfg: Mapping[str, Any]) -> None:
    for key, kind, what in (
        ("clients", (str, int), "client ids"),
        ("samples", int, "ints"),
        ("classes", int, "ints"),
    ):
        for value in cfg["exclude"][key]:
            if isinstance(value, bool) or not isinstance(value, kind):
                raise ConfigError(f"exclude.{key}={cfg['exclude'][key]}: must be a list of {what}")
            if isinstance(value, int) and value < 0:
                raise ConfigError(f"exclude.{key}={cfg['exclude'][key]}: must be >= 0 each")


def _packages_are_names(cfg: Mapping[str, Any]) -> None:
    for name in cfg["trusted_packages"]:
        if not isinstance(name, str) or not name.isidentifier():
            raise ConfigError(f"trusted_packages={cfg['trusted_packages']}: must be a list of top package names")


CHECKS: list[Callable[[Mapping[str, Any]], None]] = [
    _name_is_safe,
    _selection_fits,
    _rounds_fit_tasks,
    _exclude_names,
    _packages_are_names,
]
