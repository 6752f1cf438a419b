"""The layers of a configuration, in order: experiments, the command line, and the overrides of a run's reference.

A setting was written for the choices of its day. Where a later layer chooses something else that does not take it, such
as another strategy, the setting is left out and a remark says so; one that never fitted is an error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from fedcl.config.choices import choice
from fedcl.config.conform import SPECIAL
from fedcl.config.overrides import Setting, in_quotes, parse
from fedcl.config.value_rules import ConfigError, show

Groups = Mapping[str, Mapping[str, Path]]
Schema = Mapping[str, Any]


@dataclass(frozen=True)
class Layer:
    """Choices (group -> ``group=name``) and settings of one origin; paths in a file may be beside it."""

    origin: str
    choices: dict[str, str] = field(default_factory=dict)
    settings: tuple[Setting, ...] = ()
    beside: Path | None = None


def experiment(name: str, file: Path) -> Layer:
    """Read an experiment, with those that it builds on; ConfigError if a file is not an experiment."""
    choices: dict[str, str] = {}
    values: dict[str, Any] = {}
    for part_choices, part_values in _read(file):
        choices |= part_choices
        values |= part_values
    settings = tuple(Setting(f"{key}={show(value)}", key, value) for key, value in values.items())
    return Layer(f"experiment={name}", choices, settings, file.parent)


def typed(overrides: Sequence[str], groups: Groups, origin: str) -> Layer:
    """Return the layer of overrides that were typed; ConfigError for one that is not an override of one run."""
    choices: dict[str, str] = {}
    values: list[Setting] = []
    for text in overrides:
        override = parse(text)
        if override.is_sweep_override():
            raise ConfigError(
                f"{text}: one run takes one value; for a list write key=[a,b], for text {in_quotes(text)}"
            )
        if override.is_delete() or override.package is not None:
            raise ConfigError(f"{text}: keys cannot be removed or moved, only set: key=value")
        key = override.key_or_group
        if groups.get(key):  # a folder of groups alone, such as client, has no choices
            choices[key] = choice(key, override, groups[key])
        elif override.is_add() or override.is_force_add():
            raise ConfigError(f"{text}: keys cannot be added, only set: {text.lstrip('+')}")
        else:
            values.append(Setting(text, key, override))
    return Layer(origin, choices, tuple(values))


def _read(file: Path) -> Iterator[tuple[dict[str, str], dict[str, Any]]]:
    """Yield the choices and the settings of an experiment's parts, in their order."""
    try:
        loaded = OmegaConf.load(file)
        plain = OmegaConf.to_container(loaded) if isinstance(loaded, DictConfig) else {}
    except (OSError, YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        raise ConfigError(f"experiment/{file.name}: {error}") from error
    assert isinstance(plain, dict)
    own = dict(leaves({str(key): value for key, value in plain.items() if key != "defaults"}))
    entries = plain.get("defaults") or []
    if "_self_" not in entries:
        entries = [*entries, "_self_"]
    for entry in entries:
        if entry == "_self_":
            yield {}, own
        elif isinstance(entry, str):
            yield from _read(file.parent / f"{entry}.yaml")
        elif isinstance(entry, Mapping):
            yield dict(_choice(str(written), value) for written, value in entry.items()), {}


def _choice(written: str, value: Any) -> tuple[str, str]:
    group = written.removeprefix("override ").strip().lstrip("/")
    text = f"[{','.join(map(str, value))}]" if isinstance(value, list) else show(value)
    # Without `override` the entry adds a group that the root's defaults do not have.
    return group, f"{'' if written.startswith('override ') else '+'}{group}={text}"


def chosen(layers: Sequence[Layer], groups: Groups) -> tuple[dict[str, str], list[str]]:
    """Return the choices of all layers, where later layers win, and a remark for each choice left out."""
    taken: dict[str, str] = {}
    remarks: list[str] = []
    for place, layer in enumerate(layers):
        for group, text in layer.choices.items():
            without = next((later for later in layers[place + 1 :] if _lacks(later, group, groups)), None)
            if without is not None:
                parent = group.rpartition("/")[0]
                remarks.append(f"{layer.origin}: {text.lstrip('+')} left out: {without.choices[parent]} has no {group}")
                continue
            taken[group] = "+" + text.lstrip("+") if taken.get(group, "").startswith("+") else text
    return taken, remarks


def _lacks(layer: Layer, group: str, groups: Groups) -> bool:
    """Whether a layer chooses something that has no such group below it."""
    parent, _, name = group.rpartition("/")
    text = layer.choices.get(parent)
    if not parent or text is None:
        return False
    file = groups.get(parent, {}).get(text.partition("=")[2])
    return file is not None and name not in _below(file)


def _below(file: Path) -> set[str]:
    """Return the groups that a choice's own defaults bring."""
    plain = OmegaConf.to_container(OmegaConf.load(file)) if file.is_file() else {}
    found: set[str] = set()
    for entry in plain.get("defaults") or [] if isinstance(plain, dict) else []:
        if isinstance(entry, Mapping):
            found |= {str(written).removeprefix("override ").strip().split("@")[0] for written in entry}
        elif entry != "_self_":
            found |= _below(file.parent / f"{str(entry).split('@')[0]}.yaml")
    return found


def fitting(
    layers: Sequence[Layer],
    schema: Schema,
    schema_of: Callable[[Sequence[Layer]], Schema],
    misfit: Callable[[Setting, Schema], str | None],
) -> tuple[list[tuple[Layer, Setting]], list[str]]:
    """Return the settings that hold, in their order, and a remark for those that are left out.

    Parameters
    ----------
    layers
        The earliest first.
    schema
        What the files alone say under the choices of all layers.
    schema_of
        The same under the choices of the layers given.
    misfit
        Why a setting does not fit a schema; None if it does.

    Raises
    ------
    ConfigError
        For a setting that did not fit the choices of its own day either.
    """
    kept: list[tuple[Layer, Setting]] = []
    left_out: dict[tuple[str, str], list[str]] = {}
    for place, layer in enumerate(layers):
        before: Schema | None = None
        for one in layer.settings:
            why = misfit(one, schema)
            if why is None:
                kept.append((layer, one))
                continue
            later = {group: text for other in layers[place + 1 :] for group, text in other.choices.items()}
            if later:
                before = schema_of(layers[: place + 1]) if before is None else before
            if before is None or misfit(one, before) is not None:
                raise ConfigError(why)
            left_out.setdefault((layer.origin, _displacing(one.key, later)), []).append(one.text)
    return kept, [f"{origin}: {', '.join(texts)} left out: not for {by}" for (origin, by), texts in left_out.items()]


def _displacing(key: str, choices: Mapping[str, str]) -> str:
    """Return the choice whose settings a key is among: the longest group that its place begins with."""
    over = [group for group in choices if key.startswith(group.replace("/", ".") + ".")]
    return choices[max(over, key=len)].lstrip("+") if over else " ".join(choices.values())


def leaves(node: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the dotted key and the value of every setting in a tree."""
    for key, value in node.items():
        place = f"{path}.{key}" if path else str(key)
        if key in SPECIAL:
            continue
        if isinstance(value, Mapping) and value:
            yield from leaves(value, place)
        else:
            yield place, value
