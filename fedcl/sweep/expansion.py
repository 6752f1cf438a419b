"""Many runs from one line: Hydra's sweep grammar, read by Hydra's own parser.

``seed=0,1,2`` and ``choice(0,1,2)`` are three values, ``range(0,3)`` the same three, ``glob(*)`` every choice of a
group; ``learner=[ewc,er]`` is one value, a list, and ``learner=[ewc],[er]`` are two.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from hydra.core.override_parser.types import Glob, Override

from fedcl.config.compose import list_choices
from fedcl.config.overrides import parse
from fedcl.config.value_rules import ConfigError

_MAX_NAME = 120  # bytes that a folder's name may have, with room for what is put after it


@dataclass(frozen=True)
class Job:
    """One run of a sweep: the name of its folder, and its overrides."""

    name: str
    overrides: tuple[str, ...]


def expand(overrides: Sequence[str], config_dirs: Sequence[Path] = ()) -> list[Job]:
    """Return a job for every combination of the values that the overrides list, the last one varying fastest.

    A job is called by the settings that vary, ``learner-er_seed-0``.

    Raises
    ------
    ConfigError
        If an override is malformed, its values have no end, a key comes twice, or two jobs would be the same.
    """
    options: list[list[str]] = []
    varying: list[bool] = []
    keys: set[str] = set()
    for text in overrides:
        override = parse(text)
        if override.key_or_group in keys:
            raise ConfigError(f"{text}: {override.key_or_group} is there twice; list its values: key=value,value")
        keys.add(override.key_or_group)
        options.append(_values(override, text, config_dirs))
        varying.append(override.is_sweep_override())
    jobs = [
        Job(_name([text for text, varies in zip(choice, varying, strict=True) if varies]), choice)
        for choice in product(*options)
    ]
    if len({job.overrides for job in jobs}) < len(jobs):
        raise ConfigError(f"{' '.join(overrides)}: makes the same job twice; list each value once")
    names = Counter(job.name for job in jobs)
    return [job if names[job.name] == 1 else Job(_told_apart(job), job.overrides) for job in jobs]


def _values(override: Override, text: str, config_dirs: Sequence[Path]) -> list[str]:
    """Return one override for each value."""
    if not override.is_sweep_override():
        return [text]
    key = override.get_key_element()
    if not override.is_discrete_sweep():
        raise ConfigError(f"{text}: a sweep needs values that can be counted: key=value,value, choice() or range()")
    globbed = override.value()
    if isinstance(globbed, Glob):
        names = [name for name, _ in list_choices(override.key_or_group, config_dirs)]
        values = globbed.filter(names)
    else:
        values = list(override.sweep_string_iterator())
    if not values:
        raise ConfigError(f"{text}: has no value; list them: key=value,value")
    return [f"{key}={value}" for value in values]


def _name(overrides: Sequence[str]) -> str:
    """Return a folder's name that tells what varies: ``learner-ewc+er_seed-0``."""
    parts = []
    for text in overrides:
        key, _, value = text.partition("=")
        last = re.split(r"[./]", key.lstrip("+~"))[-1]
        listed = value.replace(" ", "").strip("[]'\"").replace(",", "+")
        parts.append(f"{last}-{re.sub(r'[^A-Za-z0-9.+-]+', '-', listed).strip('-') or 'none'}")
    return "_".join(parts)[:_MAX_NAME] or "run"


def _told_apart(job: Job) -> str:
    """Return the name of a job that another has too: cut short, or their values differ in signs that a name lacks."""
    return f"{job.name}_{hashlib.sha256(' '.join(job.overrides).encode()).hexdigest()[:8]}"
