"""The model, and the device it is on."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch

from fedcl.assembly.components import checked, of_kind
from fedcl.base.randomness import key
from fedcl.config.compose import Config
from fedcl.config.instantiate import TARGET_KEY, build, is_own, targets_in
from fedcl.config.value_rules import ConfigError
from fedcl.data.dataset import Dataset
from fedcl.models.budget import TooLarge
from fedcl.models.check import check_network
from fedcl.models.flat import FlatModel
from fedcl.models.networks import build_model
from fedcl.scenario.task import Stream


def device_of(cfg: Config) -> torch.device:
    """Return the device of ``device=auto|cpu|cuda``; ConfigError if CUDA is required and there is none."""
    if cfg["device"] == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device=cuda: this machine has no CUDA device; use auto or cpu")
    use = cfg["device"] == "cuda" or (cfg["device"] == "auto" and torch.cuda.is_available())
    return torch.device("cuda" if use else "cpu")


def make_model(cfg: Config, dataset: Dataset, stream: Stream, device: torch.device) -> FlatModel:
    """Build the network with its initial weights, the same in every process."""
    factory = functools.partial(
        build,
        cfg["model"],
        at="model",
        trusted=cfg["trusted_packages"],
        input_shape=dataset.input_shape,
        heads=stream.heads,
    )
    try:
        module = build_model(factory, seed=key(cfg["seed"], "model"))
    except TooLarge as error:
        raise ConfigError(f"{_largest(cfg['model'])}: {error}") from error
    return checked(FlatModel, of_kind(torch.nn.Module, module, "model", cfg["model"]), device=device)


def check_model(cfg: Config, dataset: Dataset, stream: Stream, model: FlatModel) -> None:
    """Refuse a network that is not fedcl's and would break what every run promises: equal bits, and nothing lost."""
    if any(is_own({TARGET_KEY: target}) for target in targets_in(cfg["model"])):
        checked(check_network, model, dataset.input_shape, sum(stream.heads))


def _largest(node: Mapping[str, Any]) -> str:
    """Return ``model.key=value`` of the largest number among a model's settings: the first to look at."""
    lists = {name: value if isinstance(value, list) else [value] for name, value in node.items()}
    sizes = {name: max((size for size in found if type(size) is int), default=0) for name, found in lists.items()}
    name = max(sizes, key=sizes.__getitem__)
    return f"model.{name}={node[name]}"
