"""Read a run's configuration: compose the YAML files, check every value, say in one line what is wrong.

Hydra composes; this module adds what Hydra leaves open: the type of a plain value, the rules beside it
(`fedcl.config.value_rules`), near misses of a key's name, and which code a ``_target_`` may name
(`fedcl.config.instantiate`). It never imports torch, so a mistake is reported at once.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import json
import os
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException
from yaml import YAMLError

from fedcl.config.checks import cross_check
from fedcl.config.choices import description, groups_in, suggest
from fedcl.config.conform import SPECIAL, conform, is_key, rule_at, rules_of
from fedcl.config.instantiate import TARGET_KEY, build, targets_in
from fedcl.config.layers import Groups, Layer, chosen, experiment, fitting, leaves, typed
from fedcl.config.overrides import Setting, in_quotes, setting
from fedcl.config.own_code import plugin_directories, plugin_packages
from fedcl.config.pairs import check_pairs
from fedcl.config.shipped import with_rules
from fedcl.config.value_rules import ConfigError, is_path, show, takes_text

__all__ = [
    "CONFIG_DIR",
    "TARGET_KEY",
    "ConfigError",
    "build",
    "compose",
    "config_hash",
    "diff",
    "kinds",
    "list_choices",
    "remarks",
    "to_yaml",
]

# Beside the package in a checkout, in site-packages and in a Flower app bundle alike.
Config = dict[str, Any]
CONFIG_DIR = Path(__file__).resolve().parents[2] / "configs"

# Hydra keeps its search path in a process-wide object; Flower runs the apps in threads.
_HYDRA_LOCK = threading.Lock()


def compose(overrides: Sequence[str], config_dirs: Sequence[Path] = (), changes: Sequence[str] = ()) -> dict[str, Any]:
    """Compose and check the configuration of a run.

    Parameters
    ----------
    overrides
        Hydra overrides such as ``learner=[ewc,er]``, ``strategy/projection=none`` or ``client.epochs=2``.
    config_dirs
        Folders with the user's own choices, laid out like ``configs/``. The built-in choices win over the same name.
    changes
        Further overrides, before which settings of `overrides` give way that their choices do not take.

    Returns
    -------
    dict
        The resolved configuration as plain containers, without its rules. ``trusted_packages`` also names the modules
        from the current directory and from beside `config_dirs` that some ``_target_`` uses. Each call returns a copy
        of its own; the work is done once a process.

    Raises
    ------
    ConfigError
        One line naming the key, the value and what is allowed.
    """
    return copy.deepcopy(_cached(overrides, config_dirs, changes)[0])


def remarks(overrides: Sequence[str], config_dirs: Sequence[Path] = (), changes: Sequence[str] = ()) -> list[str]:
    """Return remarks on a configuration: settings that were left out, pairs that are better not combined.

    Parameters and errors are those of `compose`.
    """
    return list(_cached(overrides, config_dirs, changes)[1])


def _cached(
    overrides: Sequence[str], config_dirs: Sequence[Path], changes: Sequence[str]
) -> tuple[dict[str, Any], tuple[str, ...]]:
    folders = tuple(str(Path(folder).resolve()) for folder in config_dirs)
    return _compose(tuple(overrides), tuple(changes), folders, os.getcwd(), str(CONFIG_DIR))


def path_keys(overrides: Sequence[str], config_dirs: Sequence[Path] = ()) -> frozenset[str]:
    """Return the dotted keys whose rule is a path, or holds one, in a configuration with the choices of `overrides`.

    Raises ConfigError for a choice that there is not.
    """
    roots = tuple(_roots(config_dirs))
    groups = groups_in(roots)
    choices, _ = chosen(_layers(overrides, (), groups), groups)
    return frozenset(_paths_in(_schema(roots, tuple(choices.values()))))


def _paths_in(node: Mapping[str, Any], place: str = "") -> Iterator[str]:
    for name, rule in rules_of(node, place).items():
        if re.search(r"\bpath\b", rule.text):
            yield f"{place}{name}"
    for name, value in node.items():
        if isinstance(value, Mapping) and name not in SPECIAL:
            yield from _paths_in(value, f"{place}{name}.")


def list_choices(kind: str, config_dirs: Sequence[Path] = ()) -> list[tuple[str, str]]:
    """Return (name, description) of every choice of a group such as ``learner`` or ``strategy/projection``.

    The description is the YAML's first comment line. Raises ConfigError for an unknown group.
    """
    groups = groups_in(_roots(config_dirs))
    if kind not in groups:
        raise ConfigError(f"{kind}: no such kind{suggest(kind, list(groups))}; known: {', '.join(sorted(groups))}")
    return [(name, description(file)) for name, file in sorted(groups[kind].items())]


def kinds(config_dirs: Sequence[Path] = ()) -> list[str]:
    """Return the names of the groups that have at least one choice."""
    return sorted(group for group, options in groups_in(_roots(config_dirs)).items() if options)


def diff(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """Return one line for each setting that differs: ``client.epochs: 1 -> 2``; a missing one shows as ``(absent)``."""
    old, new = dict(leaves(before)), dict(leaves(after))
    absent = "(absent)"
    return [
        f"{key}: {show(old[key]) if key in old else absent} -> {show(new[key]) if key in new else absent}"
        for key in sorted(old.keys() | new.keys())
        if key not in old or key not in new or type(old[key]) is not type(new[key]) or old[key] != new[key]
    ]


def config_hash(cfg: Mapping[str, Any]) -> str:
    """Return the SHA-256, in hexadecimal, of the configuration's canonical JSON; the order of keys does not matter."""
    text = json.dumps(cfg, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def to_yaml(cfg: Mapping[str, Any]) -> str:
    """Return the configuration as YAML text, keys in their order."""
    return OmegaConf.to_yaml(OmegaConf.create(dict(cfg)))


@functools.lru_cache(maxsize=64)
def _compose(
    overrides: tuple[str, ...], changes: tuple[str, ...], folders: tuple[str, ...], cwd: str, config_dir: str
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Return the configuration, and remarks on it."""
    del cwd  # part of the cache's key only: the user's modules are searched there
    roots = (Path(config_dir), *map(Path, folders))
    for folder in roots:
        if not folder.is_dir():
            raise ConfigError(f"--config-dir {folder}: no such folder")
    groups = groups_in(roots)
    layers = _layers(overrides, changes, groups)
    choices, left_out = chosen(layers, groups)
    schema = _schema(roots, tuple(choices.values()))
    layers = [replace(layer, settings=tuple(_read(one, schema) for one in layer.settings)) for layer in layers]

    def schema_of(some: Sequence[Layer]) -> Mapping[str, Any]:
        return _schema(roots, tuple(chosen(some, groups)[0].values()))

    settings, more = fitting(layers, schema, schema_of, functools.partial(_misfit, groups=groups))
    cfg = conform(_with(roots, tuple(choices.values()), settings, schema), schema)
    plugins = plugin_packages(targets_in(cfg), plugin_directories(folders))
    if plugins:
        cfg["trusted_packages"] = sorted({*cfg.get("trusted_packages", []), *plugins})
    cross_check(cfg)
    return cfg, (*left_out, *more, *check_pairs(cfg, schema))


def _layers(overrides: Sequence[str], changes: Sequence[str], groups: Groups) -> list[Layer]:
    command_line = typed(overrides, groups, "the command line")
    rest = [typed(changes, groups, "compare_with")] if changes else []
    names: list[Any] = []
    for layer in (command_line, *rest):
        if "experiment" in layer.choices:
            given = layer.choices.pop("experiment").partition("=")[2]
            names = [] if given == "null" else given.strip("[]").split(",")
    return [*(experiment(name, groups["experiment"][name]) for name in names), command_line, *rest]


def _with(
    roots: tuple[Path, ...],
    choices: tuple[str, ...],
    settings: Sequence[tuple[Layer, Setting]],
    schema: Mapping[str, Any],
) -> dict[str, Any]:
    """Return the composition of the choices with the settings in it."""
    composed = copy.deepcopy(_hydra(roots, choices))
    try:
        for layer, one in settings:
            value = one.value
            if layer.beside is not None and isinstance(value, str) and value.startswith("./"):
                value = str(layer.beside / value) if is_path(rule_at(schema, one.key)) else value
            OmegaConf.update(composed, one.key, value, merge=True, force_add=True)  # names were checked
        return _plain(composed, complete=True)
    except MissingMandatoryValue as error:
        raise ConfigError(f"{error.full_key}: must be given") from error
    except (OmegaConfBaseException, ValueError, RecursionError) as error:
        naming = [one.text for _, one in settings if "${" in one.text]
        told = f"{' '.join(naming)}: ${{}} names another key; a variable of the shell is $NAME; " if naming else ""
        raise ConfigError(told + _one_line(error)) from error


def _schema(roots: tuple[Path, ...], choices: tuple[str, ...]) -> Mapping[str, Any]:
    """Return what the YAML files alone say, rules and all; it is read and never changed."""
    if len(roots) == 1:
        return _built_in_schema(roots, choices)
    return with_rules(_own_schema(roots, choices), roots[0])


def _own_schema(roots: tuple[Path, ...], choices: tuple[str, ...]) -> Mapping[str, Any]:
    try:
        return _plain(_hydra(roots, choices), complete=False)
    except (OmegaConfBaseException, ValueError) as error:
        raise ConfigError(_one_line(error)) from error


_built_in_schema = functools.lru_cache(maxsize=64)(_own_schema)


def _plain(composed: DictConfig, *, complete: bool) -> dict[str, Any]:
    plain = OmegaConf.to_container(composed, resolve=True, throw_on_missing=complete)
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}


def _hydra(roots: tuple[Path, ...], choices: tuple[str, ...]) -> DictConfig:
    own = len(roots) > 1  # the user's folders may change while the process lives
    try:
        with _HYDRA_LOCK:
            return (_composed.__wrapped__ if own else _composed)(roots, choices)
    except (HydraException, OmegaConfBaseException, YAMLError, ValueError) as error:
        raise ConfigError(_one_line(error)) from error


@functools.lru_cache(maxsize=64)
def _composed(roots: tuple[Path, ...], choices: tuple[str, ...]) -> DictConfig:
    path = ",".join("'file://" + str(root).replace("'", "\\'") + "'" for root in roots[1:])
    search = [f"hydra.searchpath=[{path}]"] if path else []
    with initialize_config_dir(str(roots[0]), version_base="1.3"):
        return hydra_compose("config", overrides=[*choices, *search])


def _one_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).split("Config search path")[0].splitlines() if line.strip()]
    return " ".join(line for line in lines if "hydra.cc" not in line and not line.startswith("To append"))[:400]


def _read(one: Setting, schema: Mapping[str, Any]) -> Setting:
    """Read the value of a setting that was typed as what the key's rule makes of it."""
    return setting(one.value, one.text, rule_at(schema, one.key)) if isinstance(one.value, Override) else one


def _misfit(one: Setting, schema: Mapping[str, Any], groups: Groups) -> str | None:
    """Say why a setting does not fit what the files say, None if it does."""
    inner = [f"{one.key}.{name}" for name, _ in leaves(one.value)] if isinstance(one.value, Mapping) else []
    for place in [one.key, *inner]:
        if not is_key(place, schema):
            known = [*(name for name, _ in leaves(schema)), *groups]
            return f"{one.text}: no such key{suggest(place, known)}"
    group = one.key.replace(".", "/")
    if group in groups and isinstance(one.value, str):
        return f"{one.text}: to choose another one write {group}={one.value}"
    rule = rule_at(schema, one.key)
    if rule is None or (isinstance(one.value, str) and "${" in one.value):
        return None
    fault = rule.fault(one.value, one.key)
    if fault and takes_text(rule) and isinstance(one.value, (list, dict)):
        return f"{fault}; as text, write {in_quotes(one.text)}"
    return fault


def _roots(config_dirs: Sequence[Path]) -> list[Path]:
    return [CONFIG_DIR, *map(Path, config_dirs)]
