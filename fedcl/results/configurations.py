"""What makes two runs runs of one configuration, what makes them runs of one stream, and what to call them by."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

STREAM = ("data", "scenario", "num_clients", "exclude")
"""Keys, with everything below them, that decide which samples come to whom and when: runs that differ here met
different streams. With the seed they decide the stream completely; the rounds given to a task are a budget, and count
as a setting."""

SILENT = (
    "seed", "run_dir", "name", "compare_with", "figures", "backend", "checkpoint", "trusted_packages", "trackers",
    "protocol", "evaluation.batch_size", "unlearning.cache",
)  # fmt: skip
"""Keys that decide none of a run's numbers, and the seed: they make no configuration of its own."""

_ABSENT = "(absent)"
# component -> where in a configuration its own settings are
_PLACES = {
    "collaboration": "strategy.collaboration", "projection": "strategy.projection", "staleness": "strategy.staleness",
    "optimizer": "strategy.optimizer", "strategy": "strategy.stock", "unlearner": "unlearner", "model": "model",
    "devices": "devices", "schedule": "scenario.schedule", "scenario": "scenario", "data": "data.source",
    "partition": "data.partition",
}  # fmt: skip


def settings(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """Return dotted key -> value of everything that decides a run's numbers, but the seed."""
    found = {key: value for key, value in leaves(cfg) if not _within(key, SILENT)}
    if found.get("data.source.root") == found.get("data.root"):
        found.pop("data.source.root", None)
    return found


def stream(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """Return those of the :func:`settings` that decide the stream."""
    return {key: value for key, value in settings(cfg).items() if _within(key, STREAM)}


def leaves(node: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted key, value) of everything in nested mappings; an empty mapping is a value."""
    for key, value in node.items():
        place = f"{path}.{key}" if path else str(key)
        if isinstance(value, Mapping) and value:
            yield from leaves(value, place)
        else:
            yield place, value


def stream_differences(first: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """Return ``key: value -> value`` for each way in which the stream of another configuration is another one."""
    one, two = stream(first), stream(other)
    return [
        f"{key}: {_show(one.get(key, _ABSENT))} -> {_show(two.get(key, _ABSENT))}"
        for key in [*one, *(key for key in two if key not in one)]
        if one.get(key, _ABSENT) != two.get(key, _ABSENT)
    ]


def names(configurations: Sequence[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """Return, for each of several configurations, the settings by which it differs from the others.

    A component that is another one is called by its class, as in ``projection=FOT``, the learner by its plugins, as in
    ``learner=ewc+er``; parameters count only among configurations that have the same component.
    """
    parts = [_components(cfg) for cfg in configurations]
    # a stock strategy has no parts to differ in
    varying = [key for key in _union(parts) if len({part[key] for part in parts if key in part}) > 1]
    told = [[f"{key}={part[key]}" for key in varying if key in part] for part in parts]
    values, known = [dict(_parameters(cfg)) for cfg in configurations], list(enumerate(configurations))
    for key in _union(values):
        owner = next((name for name, place in _PLACES.items() if _within(key, (place,))), "")
        kinds = [_has_plugin(key, cfg) if key.startswith("learner.") else parts[i].get(owner) for i, cfg in known]
        for kind in dict.fromkeys(kinds):
            alike = [i for i, other in enumerate(kinds) if other == kind]
            if len({_show(values[i].get(key, _ABSENT)) for i in alike}) > 1:
                for i in alike:
                    told[i] += [f"{key}={_show(values[i][key])}"] if key in values[i] else []
    return [tuple(words) for words in told]


def _components(cfg: Mapping[str, Any]) -> dict[str, str]:
    """Return what was chosen for each thing that there is to choose: name -> class."""
    strategy = cfg.get("strategy", {})
    chosen = {"strategy": _class(strategy.get("stock")) if "stock" in strategy else "pipeline"}
    if "stock" not in strategy:
        chosen |= {part: _class(node.get("server") or node.get("client")) for part, node in strategy.items()}
    chosen["learner"] = "+".join(cfg.get("learner", {})) or "finetune"
    for name in ("unlearner", "model", "devices", "schedule", "scenario", "data", "partition"):
        node: Any = cfg
        for step in _PLACES[name].split("."):
            node = node.get(step) if isinstance(node, Mapping) else None
        chosen[name] = _class(node)
    return chosen


def _parameters(cfg: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield the settings that are no choice of a component; what a client's half repeats of its server's once only."""
    everything = settings(cfg)
    for key, value in everything.items():
        copy_model = key.replace(".client.", ".server.") if key.startswith("strategy.") else key
        repeated = copy_model != key and everything.get(copy_model, _ABSENT) == value
        if not key.endswith("_target_") and value != {} and not repeated:
            yield key, value


def _has_plugin(key: str, cfg: Mapping[str, Any]) -> bool:
    return key.split(".")[1] in cfg.get("learner", {})


def _class(node: Any) -> str:
    return str(node["_target_"]).rpartition(".")[2] if isinstance(node, Mapping) and "_target_" in node else "none"


def _within(key: str, places: Sequence[str]) -> bool:
    return any(key == place or key.startswith(place + ".") for place in places)


def _union(tables: Sequence[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(key for table in tables for key in table))


def _show(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
