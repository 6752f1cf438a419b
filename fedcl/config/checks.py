"""Checks across the keys of a configuration that need no data."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from fedcl.config.value_rules import ConfigError

_SAFE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def cross_check(cfg: Mapping[str, Any]) -> None:
    """Run every check of this file over a configuration; raises ConfigError at the first that fails."""
    for check in CHECKS:
        check(cfg)


def _name_is_safe(cfg: Mapping[str, Any]) -> None:
    # The name becomes part of a folder's: no path separators, no leading dot.
    if not _SAFE_NAME.fullmatch(cfg["name"]):
        raise ConfigError(
            f"name={cfg['name']}: must be letters, digits, '.', '_', '-', and start with a letter or digit"
        )


def _selection_fits(cfg: Mapping[str, Any]) -> None:
    clients, chosen = cfg["num_clients"], cfg["clients_per_round"]
    if chosen is not None and chosen > clients:
        raise ConfigError(f"clients_per_round={chosen}: must be <= num_clients={clients}")
    selected = chosen or clients
    if cfg["min_replies"] > selected:
        raise ConfigError(f"min_replies={cfg['min_replies']}: must be <= {selected}, the clients of a round")


def _rounds_fit_tasks(cfg: Mapping[str, Any]) -> None:
    rounds = cfg["rounds_per_task"]
    tasks = cfg["scenario"].get("num_tasks") if isinstance(cfg.get("scenario"), Mapping) else None
    if isinstance(rounds, list) and isinstance(tasks, int) and len(rounds) != tasks:
        raise ConfigError(f"rounds_per_task={rounds}: has {len(rounds)} numbers for scenario.num_tasks={tasks}")


def _rounds_can_close(cfg: Mapping[str, Any]) -> None:
    selected = cfg["clients_per_round"] or cfg["num_clients"]
    buffer = cfg["async"]["buffer"]
    if buffer is not None and not cfg["min_replies"] <= buffer <= selected:
        raise ConfigError(
            f"async.buffer={buffer}: must be in [min_replies, clients of a round] = [{cfg['min_replies']}, {selected}]"
        )
    late = buffer is not None or cfg["async"]["deadline"] is not None
    if late and "stock" in cfg["strategy"]:
        raise ConfigError("async: a stock Flower strategy is synchronous; set async.buffer=null async.deadline=null")


def _engine_has_precision(cfg: Mapping[str, Any]) -> None:
    precision = cfg["precision"]
    if precision != "float32" and cfg["engine"] not in ("auto", "loop"):
        raise ConfigError(f"precision={precision}: needs engine=auto or engine=loop, not engine={cfg['engine']}")


def _own_data_need_devices(cfg: Mapping[str, Any]) -> None:
    if not is_local(cfg):
        return
    if cfg["backend"]["name"] != "flower":
        raise ConfigError("data/partition=local: clients with data of their own are devices; use: fedcl deploy run DIR")
    if any(cfg["exclude"][key] for key in ("samples", "classes")):
        raise ConfigError("exclude: with data/partition=local the server cannot leave out devices' samples")


def is_local(cfg: Mapping[str, Any]) -> bool:
    """Whether the clients are devices that bring data of their own."""
    partition = cfg["data"].get("partition") if isinstance(cfg.get("data"), Mapping) else None
    return isinstance(partition, Mapping) and partition.get("_target_") == "fedcl.data.partition.local"


def _worker_classes_are_sound(cfg: Mapping[str, Any]) -> None:
    backend = cfg["backend"]
    classes = backend.get("worker_classes")
    if classes is None:
        return
    key = "backend.worker_classes"
    for name in ("workers", "gpus_per_worker"):
        if backend[name]:
            raise ConfigError(f"backend.{name}={backend[name]}: must be left out where {key} is given")
    for i, kind in enumerate(classes):
        _check_worker_class(f"{key}[{i}]", kind)


def _check_worker_class(place: str, kind: Mapping[str, Any]) -> None:
    for name in ("num_cpus", "num_gpus"):
        if kind.get(name, 0) > 1 and kind[name] != int(kind[name]):
            raise ConfigError(f"{place}.{name}={kind[name]}: must be a whole number above 1")
    resources = kind.get("resources", {})
    for name in sorted({"CPU", "GPU"} & resources.keys()):
        raise ConfigError(f"{place}.resources.{name}={resources[name]}: must have another name, not CPU or GPU")


def _target_fits(cfg: Mapping[str, Any]) -> None:
    target = cfg["target_accuracy"]
    if target is not None and cfg["unlearning"]["requests"]:
        raise ConfigError(
            f"target_accuracy={target}: must be null where unlearning.requests are planned; a run that may stop early "
            "cannot promise to process them"
        )


CHECKS: list[Callable[[Mapping[str, Any]], None]] = [
    _name_is_safe,
    _selection_fits,
    _rounds_fit_tasks,
    _rounds_can_close,
    _engine_has_precision,
    _own_data_need_devices,
    _worker_classes_are_sound,
    _target_fits,
]
