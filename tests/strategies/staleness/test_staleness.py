from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fedcl.base.randomness import torch_generator
from fedcl.base.tree import equal, pack, unpack
from fedcl.contracts.requests import ForgetRequest
from fedcl.contracts.strategy import GLOBAL, Staleness, Update
from fedcl.models.flat import FlatModel, Spec
from fedcl.models.networks import MLP, build_model
from fedcl.server.strategy import Pipeline
from strategies.collaboration.fedavg import FedAvg
from strategies.staleness.dc_asgd import DCASGD
from strategies.staleness.gradient_inversion import GradientInversion
from strategies.staleness.weight_prediction import WeightPrediction
from strategies.staleness.weighting import FedAsync, Weighting, exponential, fedbuff, hinge, polynomial, sigmoid
from tests.toy import configure, run_toy, write_files

SPEC = Spec.of(build_model(lambda: MLP(input_shape=(2,), heads=(2,), hidden=()), seed=0))  # six parameters
OLD = torch.tensor([0.5, -0.25, 0.125, 1.0, 0.0, -1.0])
NOW = torch.tensor([0.75, 0.25, 0.0, 1.5, 0.5, -0.5])
CHANGE = torch.tensor([0.5, -0.5, 0.25, 0.125, 0.0, -0.25])


@dataclass
class View:
    """A server between two rounds."""

    global_model: Tensor = field(default_factory=lambda: NOW)
    version: int = 10
    spec: Spec = SPEC
    own: dict[str, Tensor] = field(default_factory=dict)
    now: float = 0.0
    clients: tuple[str, ...] = ("a", "b")
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def model_of(self, client: str) -> Tensor:
        return self.own.get(client, self.global_model)

    def rng(self, purpose: str) -> torch.Generator:
        return torch_generator(0, self.version, purpose)

    def compute(self, fn: Callable[..., Any], *args: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(fn(*args))
        return future


def make(age: int, change: Tensor = CHANGE, client: str = "a") -> Update:
    base = OLD if age else NOW
    return Update(client, 0, GLOBAL, 10 - age, base, base + change, 4, 4.0, 0, 0, age)


def ready(part: Staleness) -> Staleness:
    part.setup(SPEC)
    return part


CORRECTORS: dict[str, Callable[[], Staleness]] = {
    "exponential": lambda: Weighting(rule="exponential"),
    "exponential relative": lambda: Weighting(rule="exponential", relative=True),
    "sigmoid": lambda: Weighting(rule="sigmoid"),
    "fedbuff": lambda: Weighting(rule="fedbuff"),
    "drop": lambda: Weighting(rule="drop"),
    "constant": lambda: FedAsync(weighting="constant"),
    "polynomial": FedAsync,
    "hinge": lambda: FedAsync(weighting="hinge"),
    "dc_asgd": DCASGD,
    "dc_asgd adaptive": lambda: DCASGD(adaptive=True),
}
AS_THEY_COME: dict[str, Callable[[], Staleness]] = {
    "none": Staleness,
    "unweighted": Weighting,
    "weight_prediction": WeightPrediction,  # it changes what is sent, not what comes
}


@pytest.mark.parametrize("build", [*CORRECTORS.values(), *AS_THEY_COME.values(), GradientInversion])
def test_a_fresh_update_is_left_alone(build: Callable[[], Staleness]) -> None:
    update = make(0)
    assert ready(build()).admit([update], View()) == [update]


@pytest.mark.parametrize("build", CORRECTORS.values(), ids=CORRECTORS)
def test_an_old_update_changes_the_result(build: Callable[[], Staleness]) -> None:
    def result(part: Staleness | None) -> Tensor:
        pipeline = Pipeline(collaboration=FedAvg(), staleness=part)
        pipeline.setup(SPEC)
        return pipeline.aggregate([make(10), make(0, -CHANGE, "b")], View())[GLOBAL]

    assert not torch.equal(result(build()), result(None))


@pytest.mark.parametrize("build", AS_THEY_COME.values(), ids=AS_THEY_COME)
def test_what_comes_in_as_it_is(build: Callable[[], Staleness]) -> None:
    update = make(10)
    assert ready(build()).admit([update], View()) == [update]


STATISTICS = Spec.of(nn.Sequential(nn.Linear(1, 1), nn.BatchNorm1d(1)))  # four parameters, then mean and variance


def test_statistics_are_no_weights_to_compensate_or_to_foretell() -> None:
    compensating, foretelling = DCASGD(strength=3.0, lr=0.5), WeightPrediction(horizon=2.0)
    for part in (compensating, foretelling):
        part.setup(STATISTICS)
    (update,) = compensating.admit([make(1)], View(spec=STATISTICS))
    assert torch.equal(update.delta[4:], CHANGE.double()[4:])
    assert not torch.equal(update.delta[:4], CHANGE.double()[:4])
    foretelling.outgoing(OLD, "a", View(OLD, version=1))
    sent = foretelling.outgoing(NOW, "a", View(NOW, version=2))
    torch.testing.assert_close(sent[:4], (NOW + 2 * (NOW - OLD))[:4])
    assert torch.equal(sent[4:], NOW[4:])


def test_factors_by_hand() -> None:
    assert exponential(20, 20.0) == 0.5
    assert sigmoid(10, 0.25, 10.0) == 0.5
    assert sigmoid(14, 0.25, 10.0) == pytest.approx(1 / (1 + math.e))
    assert sigmoid(10**6, 0.25, 10.0) == 0.0
    assert fedbuff(3) == 0.5
    assert polynomial(3, 0.5) == 0.5
    assert [hinge(age, 10.0, 4.0) for age in (0, 4, 5, 6)] == [1.0, 1.0, 1 / 11, 1 / 21]


def test_a_weighted_change_is_added_to_the_present_model() -> None:
    (update,) = Weighting(rule="fedbuff").admit([make(3)], View())
    assert torch.equal(update.base, NOW)
    assert torch.equal(update.delta, 0.5 * CHANGE.double())


def test_a_change_is_rebased_on_the_clients_own_model() -> None:
    own = NOW + 1.0
    (update,) = Weighting(rule="fedbuff").admit([make(3)], View(own={"a": own}))
    assert torch.equal(update.base, own)
    assert torch.equal(update.delta, 0.5 * CHANGE.double())


def test_a_relative_weight_matters_beside_others_only() -> None:
    part = Weighting(rule="fedbuff", relative=True)
    pipeline = Pipeline(collaboration=FedAvg(), staleness=part)
    pipeline.setup(SPEC)
    assert torch.equal(pipeline.aggregate([make(3)], View())[GLOBAL], NOW + CHANGE)
    mixed = pipeline.aggregate([make(3), make(0, -CHANGE, "b")], View())[GLOBAL]
    assert torch.allclose(mixed, NOW - CHANGE / 3)  # weights 2 and 4


def test_fedasync_mixes_models() -> None:
    pipeline = Pipeline(collaboration=FedAvg(), staleness=FedAsync(weighting="polynomial", alpha=0.5))
    pipeline.setup(SPEC)
    mixed = pipeline.aggregate([make(3)], View())[GLOBAL]
    assert torch.allclose(mixed, 0.75 * NOW + 0.25 * (OLD + CHANGE))


def test_dropping_everything_leaves_the_model() -> None:
    pipeline = Pipeline(collaboration=FedAvg(), staleness=Weighting(rule="drop"))
    pipeline.setup(SPEC)
    assert torch.equal(pipeline.aggregate([make(3)], View())[GLOBAL], NOW)


def test_delay_compensation_by_hand() -> None:
    # one step of lr 0.5: g = -change / lr, g~ = g + 3 g g drift, change~ = -lr g~
    (update,) = ready(DCASGD(strength=3.0, lr=0.5)).admit([make(1)], View())
    g, drift = -CHANGE.double() / 0.5, (NOW - OLD).double()
    assert torch.allclose(update.delta, -0.5 * (g + 3.0 * g * g * drift), atol=1e-6)


def test_delay_compensation_is_exact_to_first_order_on_a_known_curvature() -> None:
    # loss 1/2 h w^2 with h = g^2: at w + d the gradient is g + g^2 d, all of what one step needs
    w, d = torch.tensor(2.0, dtype=torch.float64), 0.3
    h = 1 / 2.0 * 0.5
    g = h * w
    assert float(g * g) == pytest.approx(float(h))
    (update,) = ready(DCASGD(strength=1.0, lr=0.1)).admit(
        [Update("a", 0, GLOBAL, 9, torch.full((6,), 2.0), torch.full((6,), 2.0 - 0.1 * float(g)), 1, 1.0, 0, 0, 1)],
        View(global_model=torch.full((6,), 2.0 + d)),
    )
    assert torch.allclose(update.delta, torch.full((6,), -0.1 * float(h * (w + d)), dtype=torch.float64), atol=1e-6)


@pytest.mark.parametrize("lr", [1.0, 0.5])
def test_the_adaptive_strength_by_hand(lr: float) -> None:
    part = ready(DCASGD(strength=2.0, lr=lr, adaptive=True, momentum=0.75))
    part.admit([make(0)], View())
    (update,) = part.admit([make(1)], View())
    square = CHANGE.double() ** 2
    mean = (0.75 * (0.25 * square) + 0.25 * square) / lr**2  # of gradients, which are changes over lr
    strength = 2.0 / (mean + 1e-7).sqrt()
    assert torch.allclose(update.delta, CHANGE.double() - strength / lr * square * (NOW - OLD).double(), atol=1e-6)


def test_prediction_follows_the_model_by_its_mean_step() -> None:
    part = WeightPrediction(momentum=0.5)
    part.admit([make(2)], View())
    assert part.outgoing(OLD, "a", View(OLD, version=4)) is OLD  # one model is no step yet
    one = View(OLD + 1.0, version=5)
    assert torch.equal(part.outgoing(one.global_model, "a", one), OLD + 3.0)  # its last update was two versions old
    assert part.outgoing(one.global_model, "b", one) is one.global_model
    two = View(OLD + 7.0, version=7)  # 3 a version, over two versions: 1/4 of the mean of before is left
    assert torch.equal(part.outgoing(two.global_model, "a", two), OLD + 7.0 + 2 * (0.25 + 0.75 * 3.0))
    personal = two.global_model + 1.0
    assert part.outgoing(personal, "a", two) is personal


def test_a_fixed_horizon_predicts_for_everybody() -> None:
    part = WeightPrediction(horizon=2.0)
    part.outgoing(OLD, "a", View(OLD, version=0))
    one = View(OLD + 1.0, version=1)
    sent = part.outgoing(one.global_model, "b", one)
    assert torch.equal(sent, OLD + 3.0)
    assert part.outgoing(one.global_model, "a", one) is sent


@pytest.mark.parametrize("build", [lambda: DCASGD(adaptive=True), WeightPrediction], ids=["dc_asgd", "prediction"])
def test_state_survives_and_is_forgotten(build: Callable[[], Any]) -> None:
    def go_on(part: Any) -> tuple[Tensor, Tensor]:
        three = View(NOW + 1.0, version=3)
        return part.outgoing(three.global_model, "a", three), part.admit([make(2)], three)[0].model

    def begin() -> Any:
        part = ready(build())
        for version in (1, 2):
            view = View(NOW * version, version=version)
            part.outgoing(view.global_model, "a", view)
            part.admit([make(2), make(1, client="b")], view)
        return part

    whole, resumed = begin(), ready(build())
    state = unpack(*pack(whole.state_dict()))
    resumed.load_state_dict(state)
    assert equal(resumed.state_dict(), whole.state_dict())
    assert equal(list(go_on(resumed)), list(go_on(whole)))
    assert equal(resumed.state_dict(), whole.state_dict())
    assert whole.forget(ForgetRequest("r", "client", clients=("a",))).outcome == "reset"
    assert not equal(whole.state_dict(), resumed.state_dict())


def test_inversion_needs_to_know_how_clients_train() -> None:
    part = GradientInversion()
    model = FlatModel(build_model(lambda: MLP(input_shape=(2,), heads=(2,), hidden=()), seed=0))
    assert model.spec == SPEC
    with pytest.raises(RuntimeError, match="call bind first"):
        part.admit([make(3)], View())


@pytest.mark.slow
def test_in_an_asynchronous_run_every_choice_is_its_own(tmp_path: Path) -> None:
    files = write_files(tmp_path)

    def final(choice: str, *settings: str) -> str:
        extra = ("async.buffer=1", "async.finished_task=keep", "rounds_per_task=4", "client.optimizer.lr=0.1")
        choices = {"strategy/staleness": choice, "devices": "trace"}
        cfg = configure(choices, files, torch.device("cpu"), *extra, *settings, num_tasks=1)
        return run_toy(cfg).hashes[-1]

    own = ["exponential", "sigmoid", "fedbuff", "drop", "fedasync", "dc_asgd", "dc_asgd_adaptive"]
    results = {choice: final(choice) for choice in ["none", *own]}
    results["weight_prediction"] = final("weight_prediction", "strategy.staleness.server.horizon=1")
    assert len(set(results.values())) == len(results)
    assert final("unweighted") == results["none"]
