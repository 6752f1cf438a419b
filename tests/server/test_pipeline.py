from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import pytest
import torch
from torch import Tensor

from fedcl.base.randomness import torch_generator
from fedcl.contracts.fields import MODEL, TensorField
from fedcl.contracts.learner import Payload, Plugin
from fedcl.contracts.requests import ErasureOutcome, ForgetRequest
from fedcl.contracts.strategy import GLOBAL, Collaboration, Projection, ServerOptimizer, Staleness, Target, Update
from fedcl.contracts.view import ServerView
from fedcl.models.flat import Spec, TensorSpec
from fedcl.server.strategy import Pipeline, check_payloads
from strategies.collaboration.fedavg import FedAvg

SPEC = Spec(
    [
        TensorSpec("body.weight", (2,), 0, 2, "parameter", None),
        TensorSpec("bn.running_mean", (1,), 2, 3, "buffer", None),
    ]
)


@dataclass
class View:
    """A server with fixed models."""

    models: dict[Target, Tensor]
    pipeline: Pipeline | None = None
    version: int = 3
    now: float = 0.0
    spec: Spec = SPEC
    clients: tuple[str, ...] = ("0", "1", "2")
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def global_model(self) -> Tensor:
        return self.models[GLOBAL]

    def model_of(self, client: str) -> Tensor:
        target = self.pipeline.target_of(client, self) if self.pipeline else GLOBAL
        return self.models.get(target, self.global_model)

    def model_at(self, target: Target) -> Tensor:
        return self.models.get(target, self.global_model)

    def rng(self, purpose: str) -> torch.Generator:
        return torch_generator("view", purpose)

    def compute(self, fn: Any, *args: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(fn(*args))
        return future


def update(client: str, base: Tensor, model: list[float], weight: int = 1) -> Update:
    return Update(client, 0, GLOBAL, 3, base, torch.tensor(model), weight, float(weight), 0, 0)


def make(**parts: Any) -> Pipeline:
    pipeline = Pipeline(**{"collaboration": FedAvg(), **parts})
    pipeline.setup(SPEC)
    return pipeline


def test_fedavg_by_hand() -> None:
    view = View({GLOBAL: torch.tensor([1.0, 1.0, 0.0])})
    positions: Sequence[Update | None] = [
        update("0", view.global_model, [2.0, 1.0, 4.0], 1),
        None,
        update("2", view.global_model, [4.0, 5.0, 8.0], 3),
    ]
    assert make().aggregate(positions, view)[GLOBAL].tolist() == [3.5, 4.0, 7.0]
    uniform = make(collaboration=FedAvg(weighting="uniform"))
    assert uniform.aggregate(positions, view)[GLOBAL].tolist() == [3.0, 3.0, 6.0]


class Doubles(ServerOptimizer):
    def step(self, target: Target, change: Tensor) -> Tensor:
        return 2 * change


class KeepsFirst(Projection):
    """Allows no change of the first coordinate."""

    def __init__(self) -> None:
        self.seen: list[tuple[Target, list[float]]] = []

    def apply(self, target: Target, change: Tensor, view: ServerView) -> Tensor:
        self.seen.append((target, change.tolist()))
        allowed = change.clone()
        allowed[0] = 0
        return allowed


class DropsOld(Staleness):
    def admit(self, updates: list[Update], view: ServerView) -> list[Update]:
        return [u for u in updates if u.base_version >= view.version]


def test_parts_act_in_order() -> None:
    view = View({GLOBAL: torch.zeros(3)})
    old = update("1", view.global_model, [90.0, 90.0, 90.0])
    old.base_version = 2
    projection = KeepsFirst()
    pipeline = make(staleness=DropsOld(), optimizer=Doubles(), projection=projection)
    models = pipeline.aggregate([update("0", view.global_model, [1.0, 2.0, 3.0]), old], view)
    assert projection.seen == [(GLOBAL, [2.0, 4.0, 6.0])]
    assert models[GLOBAL].tolist() == [0.0, 4.0, 6.0]
    assert models[GLOBAL].dtype == torch.float32


class Swap(Collaboration):
    """Gives each client the other's model: a stack, with targets."""

    needs: ClassVar[Literal["sum", "stack"]] = "stack"
    personal = True

    def __init__(self) -> None:
        self.known: set[str] = set()

    def message_for(self, client: str, view: ServerView) -> tuple[Target, dict[str, Tensor]]:
        return (client if client in self.known else GLOBAL), {}

    def combine(self, updates: list[Update], view: ServerView) -> dict[Target, Tensor]:
        self.known |= {u.client for u in updates}
        a, b = updates
        return {a.client: b.model, b.client: a.model}


def test_a_change_of_a_target_starts_from_its_own_model() -> None:
    projection = KeepsFirst()
    pipeline = make(collaboration=Swap(), projection=projection)
    view = View({GLOBAL: torch.tensor([1.0, 1.0, 1.0])}, pipeline)
    updates = [update("0", view.global_model, [5.0, 6.0, 7.0]), update("1", view.global_model, [2.0, 3.0, 4.0])]
    view.models |= pipeline.aggregate(updates, view)
    assert view.models["0"].tolist() == [1.0, 3.0, 4.0]  # from the global model: the client's first own one
    assert view.models["1"].tolist() == [1.0, 6.0, 7.0]
    assert view.models[GLOBAL].tolist() == [1.0, 1.0, 1.0]
    projection.seen.clear()
    pipeline.aggregate(updates, view)
    assert projection.seen == [("0", [1.0, 0.0, 0.0]), ("1", [4.0, 0.0, 0.0])]


class LocalBuffers(FedAvg):
    def shares(self, tensor: TensorSpec) -> bool:
        return tensor.kind != "buffer"


def test_a_tensor_that_is_not_shared_is_never_changed() -> None:
    view = View({GLOBAL: torch.zeros(3)})
    pipeline = make(collaboration=LocalBuffers(), optimizer=Doubles())
    assert pipeline.aggregate([update("0", view.global_model, [1.0, 2.0, 3.0])], view)[GLOBAL].tolist() == [2, 4, 0]


class Tally(Projection):
    def __init__(self) -> None:
        self.count = 0

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.count = state["count"]

    def metrics(self) -> dict[str, float]:
        return {"count": float(self.count)}

    def forget(self, request: ForgetRequest) -> ErasureOutcome:
        return ErasureOutcome("Tally", "retained", "counts only")


def test_state_metrics_and_forgetting_reach_every_part() -> None:
    part = Tally()
    part.count = 5
    pipeline = make(projection=part)
    assert pipeline.metrics() == {"projection/count": 5.0}
    state = pipeline.state_dict()
    assert set(state) == {"staleness", "collaboration", "optimizer", "projection"}
    other = make(projection=Tally())
    other.load_state_dict(state)
    assert other.metrics() == {"projection/count": 5.0}
    outcomes = pipeline.forget(ForgetRequest("r", "client", clients=("0",)))
    assert [r.outcome for r in outcomes] == ["not applicable"] * 3 + ["retained"]


UP = Payload("sum", "up", MODEL)
DOWN = Payload("control", "down")


def sends(*declared: Payload) -> Plugin:
    class Sends(Plugin):
        payloads = declared

    return Sends()


def test_payloads_of_both_sides_must_agree() -> None:
    check_payloads([], [sends()])
    check_payloads([UP, DOWN], [sends(UP, DOWN)])
    check_payloads([UP, DOWN], [sends(UP)])  # a client may leave what it is sent unread
    with pytest.raises(ValueError, match="nobody uploads 'sum'"):
        check_payloads([UP, DOWN], [sends(DOWN)])
    with pytest.raises(ValueError, match="Sends exchanges 'sum'"):
        check_payloads([DOWN], [sends(UP, DOWN)])
    with pytest.raises(ValueError, match="Sends exchanges 'sum'"):
        check_payloads([Payload("sum", "up", MODEL, reduction="stack")], [sends(UP)])
    with pytest.raises(ValueError, match="both upload 'sum'"):
        check_payloads([UP], [sends(UP), sends(UP)])
    with pytest.raises(ValueError, match="Sends exchanges 'sum'"):
        check_payloads([Payload("sum", "up", TensorField(("model",), "float64"))], [sends(UP)])
    # who knows bounds may say so
    check_payloads([Payload("sum", "up", TensorField(("model",), low=0.0))], [sends(UP)])
    with pytest.raises(ValueError, match="an upload needs a TensorField"):
        Payload("sum", "up")
