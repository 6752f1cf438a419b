"""How clients train: their optimizer, and the learning rates of rounds and steps."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor

from fedcl.assembly.components import component, of_kind
from fedcl.assembly.settings import Settings
from fedcl.client.lr_schedule import RoundRates, TaskDecay
from fedcl.client.torch_optimizer import TorchOptimizer
from fedcl.config.compose import TARGET_KEY, Config
from fedcl.config.instantiate import build, builder, locate
from fedcl.config.value_rules import ConfigError
from fedcl.contracts.learner import LocalTraining
from fedcl.contracts.optimizer import LocalOptimizer, RateSchedule
from fedcl.data.augmentation import Augmentation
from fedcl.scenario.task import Schedule

_AT, _SCHEDULE = "client.optimizer", "client.schedule"
_OURS = {"lr", "state", "task_decay", "args"}  # not the optimizer's own


def local_training(cfg: Config, params: Sequence[Tensor] = ()) -> LocalTraining:
    """Return how clients train; ConfigError for an optimizer or a schedule that cannot be built.

    An optimizer of torch's kind is tried on copies of ``params``, if there are any.
    """
    training = replace(Settings.of(cfg).training, augment=augmentation(cfg))
    schedule = _schedule(cfg)
    if schedule is not None and cfg["client"]["schedule"]["horizon"] == "local":
        training = replace(training, schedule=schedule)
    node = cfg["client"]["optimizer"]
    return training if TARGET_KEY not in node else replace(training, optimizer=_optimizer(cfg, node, params))


def augmentation(cfg: Config) -> Augmentation | None:
    """Return what changes the samples of training steps; None if nothing does."""
    return component(cfg, "data.augment", Augmentation) if TARGET_KEY in cfg["data"]["augment"] else None


def local_rates(cfg: Config, schedule: Schedule) -> Callable[[str, int], float] | None:
    """Return the learning rate by client and round; None if it is always the same."""
    settings, shape = Settings.of(cfg), _schedule(cfg)
    base = TaskDecay(settings.training.lr, settings.task_decay, schedule)
    if shape is None or cfg["client"]["schedule"]["horizon"] == "local":
        return None if settings.task_decay == 1.0 else base
    return RoundRates(base, shape, cfg["client"]["schedule"]["horizon"], schedule)


def _schedule(cfg: Config) -> RateSchedule | None:
    node = cfg["client"]["schedule"]
    if TARGET_KEY not in node:
        return None
    if node.get("horizon") not in ("local", "task", "run"):
        raise ConfigError(f"{_SCHEDULE}.horizon={node.get('horizon')}: must be one of local, task, run")
    own = {name: value for name, value in node.items() if name != "horizon"}
    made = build(own, at=_SCHEDULE, trusted=cfg["trusted_packages"])
    return of_kind(RateSchedule, made, _SCHEDULE, node)  # type: ignore[type-abstract]


def _optimizer(cfg: Config, node: Mapping[str, Any], params: Sequence[Tensor]) -> Callable[[], LocalOptimizer]:
    target = node[TARGET_KEY]
    # torch as a whole is not trusted: `torch.load` reads pickles
    trusted = [*cfg["trusted_packages"], *(["torch"] if target.startswith("torch.optim.") else [])]
    found = locate(target, trusted, _AT)
    args = node.get("args") or {}
    both = args.keys() & node.keys()
    if both:
        raise ConfigError(f"{_AT}.args.{min(both)}: is a key of {_AT} itself; write {_AT}.{min(both)}")
    own = {name: value for name, value in {**node, **args}.items() if name not in _OURS}
    if inspect.isclass(found) and issubclass(found, LocalOptimizer):
        return cast(Callable[[], LocalOptimizer], builder(own, at=_AT, trusted=trusted))
    if not (inspect.isclass(found) and issubclass(found, torch.optim.Optimizer)):
        raise ConfigError(f"{_AT}.{TARGET_KEY}={target}: must be a LocalOptimizer or an optimizer of torch")
    make = functools.partial(build, {**own, "lr": node["lr"]}, at=_AT, trusted=trusted)
    fits = [param.detach().clone().requires_grad_() for param in params] or [torch.zeros(2, 2, requires_grad=True)]
    trial = TorchOptimizer(lambda tensors: make(params=tensors))
    try:
        trial.step(fits, [torch.zeros_like(param) for param in fits], node["lr"])
    except ConfigError:
        raise
    except Exception as error:  # whatever another package's code raises: it is the choice that does not fit
        raise ConfigError(f"{_AT}.{TARGET_KEY}={target}: cannot train this model step by step: {error}") from error
    return lambda: TorchOptimizer(lambda tensors: make(params=tensors))
