"""Read a run's configuration: compose the YAML files, check every value, say in one line what is wrong.

Hydra composes; this module adds what Hydra leaves open: the type of a plain value, the rules beside it
(`fedcl.rules`), near misses of a key's name, and which code a ``_target_`` may name (`fedcl.building`). It never
imports torch, so a mistake is answered at once.
"""

from __future__ import annotations

import copy
import difflib
import functools
import hashlib
import json
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from fedcl.building import TARGET_KEY, build, plugin_directories, plugin_packages, targets_in
from fedcl.crosschecks import cross_check
from fedcl.rules import RULES_KEY, ConfigError, conform, show

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
    "quoted",
    "to_yaml",
]

# Beside the package in a checkout, in site-packages and in a Flower app bundle alike.
CONFIG_DIR = Path(__file__).resolve().parents[1] / "configs"

# Hydra keeps its search path in a process-wide object; Flower runs the apps in threads.
_HYDRA_LOCK = threading.Lock()


def compose(overrides: Sequence[str], config_dirs: Sequence[Path] = ()) -> dict[str, Any]:
    """Compose and check the configuration of a run.

    Parameters
    ----------
    overrides
        Hydra overrides such as ``learner=[ewc,er]``, ``strategy/projection=none`` or ``client.epochs=2``.
    config_dirs
        Folders with choices of one's own, laid out like ``configs/``. The built-in choices win over the same name.

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
    folders = tuple(str(Path(folder).resolve()) for folder in config_dirs)
    return copy.deepcopy(_compose(tuple(overrides), folders, os.getcwd(), str(CONFIG_DIR)))


def list_choices(kind: str, config_dirs: Sequence[Path] = ()) -> list[tuple[str, str]]:
    """Return (name, description) of every choice of a group such as ``learner`` or ``strategy/projection``.

    The description is the YAML's first comment line. Raises ConfigError for an unknown group.
    """
    groups = _groups(_roots(config_dirs))
    if kind not in groups:
        raise ConfigError(f"{kind}: no such kind{_suggest(kind, list(groups))}; known: {', '.join(sorted(groups))}")
    return [(name, _description(file)) for name, file in sorted(groups[kind].items())]


def kinds(config_dirs: Sequence[Path] = ()) -> list[str]:
    """Return the names of the groups that have at least one choice."""
    return sorted(group for group, options in _groups(_roots(config_dirs)).items() if options)


def diff(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """Return one line for each setting that differs: ``client.epochs: 1 -> 2``; a missing one shows as ``(absent)``."""
    old, new = dict(_leaves(before)), dict(_leaves(after))
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
def _compose(overrides: tuple[str, ...], folders: tuple[str, ...], cwd: str, config_dir: str) -> dict[str, Any]:
    del cwd  # part of the cache's key only: modules of one's own are looked for there
    roots = [Path(config_dir), *map(Path, folders)]
    for folder in roots:
        if not folder.is_dir():
            raise ConfigError(f"--config-dir {folder}: no such folder")
    groups = _groups(roots)
    choices, values = _split(overrides, groups)
    schema = _schema(tuple(roots), tuple(_schema_choices(choices, groups)))
    for override in values:
        _check_key(override, schema, groups)
    full = _hydra(roots, [*choices.values(), *(str(override.input_line) for override in values)])
    cfg = conform(full, schema)
    plugins = plugin_packages(targets_in(cfg), plugin_directories(folders))
    if plugins:
        cfg["trusted_packages"] = sorted({*cfg.get("trusted_packages", []), *plugins})
    cross_check(cfg)
    return cfg


@functools.lru_cache(maxsize=64)
def _schema(roots: tuple[Path, ...], choices: tuple[str, ...]) -> dict[str, Any]:
    """Return what the YAML files alone say, rules and all; it is read and never changed."""
    return _hydra(roots, choices, complete=False)


def _hydra(roots: Sequence[Path], overrides: Sequence[str], complete: bool = True) -> dict[str, Any]:
    own = len(roots) > 1  # folders of one's own may change while the process lives
    try:
        with _HYDRA_LOCK:
            composed = (_composed.__wrapped__ if own else _composed)(tuple(roots), tuple(overrides))
            plain = OmegaConf.to_container(composed, resolve=True, throw_on_missing=complete)
    except (HydraException, OmegaConfBaseException, YAMLError, ValueError) as error:
        raise ConfigError(_one_line(error)) from error
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}


@functools.lru_cache(maxsize=64)
def _composed(roots: tuple[Path, ...], overrides: tuple[str, ...]) -> DictConfig:
    path = ",".join("'file://" + str(root).replace("'", "\\'") + "'" for root in roots[1:])
    search = [f"hydra.searchpath=[{path}]"] if path else []
    with initialize_config_dir(str(roots[0]), version_base="1.3"):
        return hydra_compose("config", overrides=[*overrides, *search])


def _one_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).split("Config search path")[0].splitlines() if line.strip()]
    return " ".join(line for line in lines if "hydra.cc" not in line and not line.startswith("To append"))[:400]


def _split(overrides: Sequence[str], groups: Mapping[str, Mapping[str, Path]]) -> tuple[dict[str, str], list[Override]]:
    """Part the overrides into choices (group -> the override as Hydra takes it) and values."""
    choices: dict[str, str] = {}
    values: list[Override] = []
    parser = OverridesParser.create()
    for given in overrides:
        text = quoted(given)
        try:
            override = parser.parse_override(text)
        except (HydraException, ValueError) as error:
            raise ConfigError(f"{text}: not an override; write key=value ({_one_line(error)})") from error
        if override.is_sweep_override():
            raise ConfigError(f"{text}: one run takes one value; for a list write key=[a,b]")
        if override.is_delete() or override.package is not None:
            raise ConfigError(f"{text}: keys cannot be removed or moved, only set: key=value")
        key = override.key_or_group
        if key in groups:
            choices[key] = _choice(key, override, groups[key])
        elif override.is_add() or override.is_force_add():
            raise ConfigError(f"{text}: keys cannot be added, only set: key=value")
        else:
            values.append(override)
    return choices, values


def quoted(text: str) -> str:
    """Return ``compare_with=a=1 b=2`` with its value quoted: overrides inside an override would not parse."""
    key, _, value = text.partition("=")
    if key.strip() != "compare_with" or "=" not in value or value.strip()[:1] in ("'", '"'):
        return text
    escaped = value.replace("\\", "\\\\").replace('"', '\\"')
    return f'{key}="{escaped}"'


def _choice(group: str, override: Override, options: Mapping[str, Path]) -> str:
    value = override.value()
    names = value if isinstance(value, list) else [value]
    if value is None and group == "experiment":
        return f"{group}=null"
    twice = [str(name) for i, name in enumerate(names) if name in names[:i]]
    if twice:
        raise ConfigError(f"{group}=[{','.join(map(str, names))}]: names {twice[0]} twice; write it once")
    for name in names:
        if str(name) not in options:
            raise ConfigError(f"{group}={show(name)}: no such choice; available: {', '.join(sorted(options))}")
    return f"{group}=[{','.join(map(str, names))}]" if isinstance(value, list) else f"{group}={value}"


def _schema_choices(choices: Mapping[str, str], groups: Mapping[str, Mapping[str, Path]]) -> list[str]:
    """Return the choices of a run with its experiment's choices but not its values: these are to be checked too."""
    chosen = dict(choices)
    names = chosen.pop("experiment", "experiment=null").split("=", 1)[1].strip("[]").split(",")
    taken: dict[str, str] = {}
    for name in names:
        if name in groups.get("experiment", {}):
            taken.update(_experiment_choices(groups["experiment"][name]))
    for group, text in chosen.items():
        taken[group] = "+" + text if taken.get(group, "").startswith("+") else text
    return [*taken.values()]


def _experiment_choices(file: Path) -> dict[str, str]:
    try:
        entries = _container(OmegaConf.load(file)).get("defaults", [])
    except (OSError, YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"experiment/{file.name}: {_one_line(error)}") from error
    taken: dict[str, str] = {}
    for entry in entries:
        if isinstance(entry, str) and entry != "_self_":
            taken.update(_experiment_choices(file.parent / f"{entry}.yaml"))
        elif isinstance(entry, Mapping):
            for written, value in entry.items():
                group = str(written).removeprefix("override ").strip().lstrip("/")
                text = f"[{','.join(map(str, value))}]" if isinstance(value, list) else show(value)
                # Without `override` the entry adds a group that the root's defaults do not have.
                taken[group] = f"{'' if str(written).startswith('override ') else '+'}{group}={text}"
    return taken


def _container(node: Any) -> dict[str, Any]:
    plain = OmegaConf.to_container(node) if isinstance(node, DictConfig) else {}
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}


def _check_key(override: Override, schema: Mapping[str, Any], groups: Mapping[str, Mapping[str, Path]]) -> None:
    key, text = override.key_or_group, override.input_line
    value = override.value()
    inner = [f"{key}.{name}" for name, _ in _leaves(value)] if isinstance(value, Mapping) else []
    for place in [key, *inner]:
        node: Any = schema
        for part in place.split("."):
            if not isinstance(node, Mapping) or part not in node or part == RULES_KEY:
                known = [*(name for name, _ in _leaves(schema)), *groups]
                raise ConfigError(f"{text}: no such key{_suggest(place, known)}")
            node = node[part]
    group = key.replace(".", "/")
    if group in groups and isinstance(value, str):
        raise ConfigError(f"{text}: to choose another one write {group}={value}")


def _suggest(key: str, known: Sequence[str]) -> str:
    def likeness(candidate: str) -> float:
        whole = difflib.SequenceMatcher(None, key, candidate).ratio()
        # Half-remembered settings are mostly remembered by their last word.
        last = difflib.SequenceMatcher(None, key.split(".")[-1], candidate.split(".")[-1]).ratio()
        return max(whole, 0.9 * last)

    scores = {name: likeness(name) for name in known}
    best = max(scores.values(), default=0.0)
    near = sorted(name for name, score in scores.items() if score >= max(0.6, best - 0.05))[:3]
    return f"; did you mean {' or '.join(near)}?" if near else ""


def _leaves(node: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in node.items():
        place = f"{path}.{key}" if path else str(key)
        if key == RULES_KEY:
            continue
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, place)
        else:
            yield place, value


def _roots(config_dirs: Sequence[Path]) -> list[Path]:
    return [CONFIG_DIR, *map(Path, config_dirs)]


def _groups(roots: Sequence[Path]) -> dict[str, dict[str, Path]]:
    groups: dict[str, dict[str, Path]] = {}
    for root in roots:
        for path in sorted(root.rglob("*")):
            if path.is_dir():
                groups.setdefault(path.relative_to(root).as_posix(), {})
            elif path.suffix == ".yaml" and path.parent != root:
                groups.setdefault(path.parent.relative_to(root).as_posix(), {}).setdefault(path.stem, path)
    return groups


def _description(file: Path) -> str:
    for line in file.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        if not line.startswith("# @package"):
            return line.lstrip("# ").strip()
    return ""
