"""Clients in this process, and what an unlearner's server half sees of them: the real client halves, no messages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fedcl.base.randomness import torch_generator
from fedcl.contracts.fields import Form
from fedcl.contracts.learner import LocalTraining
from fedcl.contracts.requests import ForgetRequest
from fedcl.contracts.statistics import Statistics
from fedcl.contracts.strategy import LocalWork, Target
from fedcl.contracts.unlearner import Samples, UnlearnContext, Unlearner, Value
from fedcl.contracts.view import Response
from fedcl.messages import Reply
from fedcl.models.flat import FlatModel, Spec
from fedcl.scenario.streams import ClassIncremental
from fedcl.scenario.task import Task
from fedcl.server.validation import Expected, rejection

NOTHING = Samples(torch.empty(0), torch.empty(0, dtype=torch.long))
ASKED = ForgetRequest("a", "class", classes=(0,))


@dataclass
class Serving:
    """``held`` maps each client to (forget set, what it retains); those in ``leaving`` do not stay."""

    unlearner: Unlearner
    model: FlatModel
    held: Mapping[str, tuple[Samples, Samples]]
    leaving: tuple[str, ...] = ()
    statistics: Statistics = field(default_factory=Statistics)
    asked: list[tuple[str, str]] = field(default_factory=list)
    server_round: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def __post_init__(self) -> None:
        self.initial = self.model.vector()
        self.num_columns = self.model.spec["head.weight"].shape[0]
        samples = next((s for pair in self.held.values() for s in pair if len(s)), None)
        if samples is not None:
            shape = tuple(samples.x.shape[1:])
            stream = ClassIncremental(num_classes=self.num_columns, input_shape=shape, seed=0, num_tasks=1)
            self.unlearner.bind(LocalWork(self.model, LocalTraining(), stream, shape))

    @property
    def spec(self) -> Spec:
        return self.model.spec

    @property
    def clients(self) -> tuple[str, ...]:
        return tuple(client for client in self.held if client not in self.leaving)

    @property
    def owners(self) -> tuple[str, ...]:
        return tuple(client for client, (forget, _) in self.held.items() if len(forget))

    def rng(self, purpose: str) -> torch.Generator:
        return torch_generator(0, purpose)

    def model_of(self, client: str) -> Tensor:
        return self.initial

    def ask(
        self,
        step: str,
        models: Mapping[str, Tensor],
        response: Form,
        tensors: Mapping[str, Tensor] | None = None,
        tasks: Mapping[str, Sequence[Task]] | None = None,
        **args: Value,
    ) -> list[Response]:
        responses, expected = [], Expected.of("unlearn", self.spec, response)
        for client, vector in models.items():
            self.asked.append((step, client))
            done = self.unlearner.local(self.context(client, vector, dict(tensors or {}), dict(args)), step)
            assert rejection(Reply(done.num_examples, payload=done.tensors), expected) is None
            if done.num_examples:
                responses.append(Response(client, done.num_examples, done.tensors))
        return responses

    def context(
        self,
        client: str,
        vector: Tensor,
        tensors: dict[str, Tensor] | None = None,
        args: dict[str, Value] | None = None,
    ) -> UnlearnContext:
        self.model.load(vector)
        forget, retain = self.held[client]
        return UnlearnContext(
            model=self.model, received=vector, forget=forget, retain=retain, requests=(ASKED,),
            training=LocalTraining(), client=client, seed=0, local_round=0, num_columns=self.num_columns,
            tensors=tensors or {}, args=args or {},
        )  # fmt: skip

    def retrain(self) -> dict[Target, Tensor]:
        raise RuntimeError("clients in this process have no history")

    def serve(self, vector: Tensor | None = None) -> Tensor:
        """Return the global model after the request, as it was where the unlearner returns none."""
        before = self.initial if vector is None else vector
        return self.unlearner.unlearn([ASKED], {"*": before}, self).get("*", before)
