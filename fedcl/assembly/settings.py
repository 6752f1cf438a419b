"""The values of a run's configuration, typed. What has a ``_target_`` stays a mapping until it is built."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Literal

from fedcl.client.engines import Engine
from fedcl.config.compose import TARGET_KEY, Config
from fedcl.contracts.learner import LocalTraining
from fedcl.server.rounds import RoundOptions
from fedcl.unlearning.service import UnlearningOptions


@dataclass(frozen=True, slots=True)
class Exclude:
    """``exclude.*``: what is left out of training."""

    clients: list[str | int]
    samples: list[int]
    classes: list[int]


@dataclass(frozen=True, slots=True)
class Evaluation:
    """``evaluation.*``: when models are tested, and how many samples at a time."""

    every: int
    batch_size: int
    personal: bool
    iterations: int


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """``checkpoint.*``: how often a run is saved, and how many checkpoints stay."""

    every: int
    min_seconds: float
    keep: int


@dataclass(frozen=True, slots=True)
class Requests:
    """``unlearning.*``: the planned requests, how they are processed, and what is measured."""

    requests: list[dict[str, Any]]
    window: int
    options: UnlearningOptions
    cache: str | None
    klom: int
    references: int
    trigger: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Backend:
    """``backend.*``; each backend has some of these."""

    name: Literal["inline", "ray", "flower"]
    workers: int | None = None
    address: str | None = None
    state: Literal["memory", "files"] = "memory"
    gpus_per_worker: float = 0.0
    worker_classes: list[dict[str, Any]] | None = None
    client_timeout: float | None = None
    join_seconds: float = 300.0
    min_clients: int | None = None
    max_message_mb: int = 512


@dataclass(frozen=True, slots=True)
class Settings:
    """A run's settings: those of the root, and of ``client``, ``async`` (in ``rounds``) and the other sections."""

    seed: int
    num_clients: int
    clients_per_round: int | None
    rounds_per_task: int | list[int]
    max_update_norm: float | None
    target_accuracy: float | None
    device: Literal["auto", "cpu", "cuda"]
    deterministic: bool
    engine: Engine
    figures: bool
    trusted_packages: list[str]
    exclude: Exclude
    training: LocalTraining
    task_decay: float
    rounds: RoundOptions
    evaluation: Evaluation
    checkpoint: Checkpoint
    unlearning: Requests
    backend: Backend

    @classmethod
    def of(cls, cfg: Config) -> Settings:
        """Read them from a composed configuration."""
        client, requests = cfg["client"], dict(cfg["unlearning"])
        optimizer = client["optimizer"]
        sgd = {} if TARGET_KEY in optimizer else {name: optimizer[name] for name in ("momentum", "weight_decay")}
        options = UnlearningOptions(**{f.name: requests.pop(f.name) for f in fields(UnlearningOptions)})
        sections = {
            "exclude": Exclude(**cfg["exclude"]),
            "training": LocalTraining(
                epochs=client["epochs"],
                batch_size=client["batch_size"],
                lr=optimizer["lr"],
                **sgd,
                precision=cfg["precision"],
                keep=optimizer.get("state", "reset") == "keep",
                clip_norm=client["clip_norm"],
                accumulate=client["accumulate"],
            ),
            "task_decay": optimizer.get("task_decay", 1.0),
            "rounds": RoundOptions(
                seed=cfg["seed"],
                clients_per_round=cfg["clients_per_round"],
                min_replies=cfg["min_replies"],
                retries=cfg["round_retries"],
                **cfg["async"],
            ),
            "evaluation": Evaluation(**cfg["evaluation"]),
            "checkpoint": Checkpoint(**cfg["checkpoint"]),
            "unlearning": Requests(options=options, **requests),
            "backend": Backend(**cfg["backend"]),
        }
        return cls(**sections, **{f.name: cfg[f.name] for f in fields(cls) if f.name not in sections})

    @property
    def is_late(self) -> bool:
        """Whether updates may be late."""
        return self.rounds.buffer is not None or self.rounds.deadline is not None
