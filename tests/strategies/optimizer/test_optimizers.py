from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAdagrad, FedAdam, FedYogi
from numpy.typing import NDArray
from torch import Tensor

from fedcl.base.randomness import torch_generator
from fedcl.base.tree import equal, pack, unpack
from fedcl.contracts.requests import ForgetRequest
from fedcl.contracts.strategy import GLOBAL, ServerOptimizer
from fedcl.models.flat import Spec, TensorSpec
from fedcl.simulation.compat import identity
from strategies.optimizer.adaptive import Adagrad, Adam, Adaptive, Yogi
from strategies.optimizer.sgd import SGD

SPEC = Spec([TensorSpec("w", (3,), 0, 3, "parameter", None), TensorSpec("running_var", (2,), 3, 5, "buffer", None)])
ALL: list[Callable[[], ServerOptimizer]] = [SGD, Adam, Adagrad, Yogi]


def vec(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def ready(optimizer: ServerOptimizer) -> ServerOptimizer:
    optimizer.setup(SPEC)
    return optimizer


def changes(count: int, seed: int = 0) -> list[Tensor]:
    generator = torch_generator("optimizers", seed)
    return [torch.randn(5, generator=generator, dtype=torch.float64) for _ in range(count)]


def test_sgd_by_hand() -> None:
    sgd = ready(SGD(lr=0.5, momentum=0.5))
    assert sgd.step(GLOBAL, vec(1, -2, 0, 9, 9)).tolist() == [0.5, -1, 0, 9, 9]
    assert sgd.step(GLOBAL, vec(1, 0, 4, 7, 7)).tolist() == [0.75, -0.5, 2, 7, 7]  # v = 1.5, -1, 4
    assert sgd.step(GLOBAL, vec(0, 0, 0, 0, 0)).tolist() == [0.375, -0.25, 1, 0, 0]


@pytest.mark.parametrize("change", changes(3))
def test_sgd_with_lr_one_and_no_momentum_is_the_identity(change: Tensor) -> None:
    sgd = ready(SGD(lr=1.0, momentum=0.0))
    assert torch.equal(sgd.step(GLOBAL, change), change)
    assert sgd.state_dict() == {}


def test_adam_by_hand() -> None:
    adam = ready(Adam(lr=0.1, beta_1=0.5, beta_2=0.75, tau=1.0, initial_v=0.0))
    # m = 2, v = 4: 0.1 * 2 / (2 + 1); then m = 1 - 2 = -1, v = 3 + 4 = 7
    torch.testing.assert_close(adam.step(GLOBAL, vec(4, 0, 0, 1, 1)), vec(0.2 / 3, 0, 0, 1, 1))
    torch.testing.assert_close(adam.step(GLOBAL, vec(-4, 0, 0, 1, 1)), vec(-0.1 / (7**0.5 + 1), 0, 0, 1, 1))


def test_adagrad_by_hand() -> None:
    adagrad = ready(Adagrad(lr=1.0, beta_1=0.0, tau=1.0, initial_v=0.0))
    torch.testing.assert_close(adagrad.step(GLOBAL, vec(3, 0, 0, 1, 1)), vec(3 / 4, 0, 0, 1, 1))
    torch.testing.assert_close(adagrad.step(GLOBAL, vec(4, 0, 0, 1, 1)), vec(4 / 6, 0, 0, 1, 1))  # v = 9 + 16


def test_yogi_by_hand() -> None:
    yogi = ready(Yogi(lr=1.0, beta_1=0.0, beta_2=0.75, tau=1.0, initial_v=5.0))
    # v = 5: below 16, rises by 4 to 9; then above 1, falls by 1/4
    torch.testing.assert_close(yogi.step(GLOBAL, vec(4, 0, 0, 1, 1)), vec(4 / 4, 0, 0, 1, 1))
    torch.testing.assert_close(yogi.step(GLOBAL, vec(1, 0, 0, 1, 1)), vec(1 / (8.75**0.5 + 1), 0, 0, 1, 1))


def test_the_second_moment_starts_at_tau_squared() -> None:
    # v = 0.99 * 4 + 0.01 * 0 with tau = 2: a change of 0 leaves it near 4
    adam = Adam(tau=2.0)
    ready(adam).step(GLOBAL, vec(0, 1, 0, 0, 0))
    torch.testing.assert_close(adam.state_dict()["v"][GLOBAL], vec(3.96, 3.97, 3.96))


@pytest.mark.parametrize(("ours", "theirs"), [(Adam, FedAdam), (Yogi, FedYogi), (Adagrad, FedAdagrad)])
def test_flowers_numbers(ours: type[Adaptive], theirs: type[FedAdam]) -> None:
    """Flower's new weights, but for the bias correction that its FedAdam alone multiplies lr with."""
    decay = {} if ours is Adagrad else {"beta_2": 0.9}
    optimizer = ready(ours(lr=0.2, beta_1=0.8, tau=0.01, initial_v=0.0, **decay))  # type: ignore[call-arg]
    flower = theirs(eta=0.2, tau=0.01, **({} if ours is Adagrad else {"beta_1": 0.8, "beta_2": 0.9}))
    flower.beta_1 = 0.8  # Flower's FedAdagrad takes none
    weights = np.array([1.0, -2.0, 0.5])
    for server_round, change in enumerate(changes(4), start=1):
        flower.current_arrays = {"w": weights}
        arrays, _ = flower.aggregate_train(server_round, [reply(weights + change[:3].numpy())])
        assert arrays is not None
        correction = np.sqrt(1 - 0.9 ** (server_round + 1)) / (1 - 0.8 ** (server_round + 1)) if ours is Adam else 1.0
        step = optimizer.step(GLOBAL, change)[:3].numpy()
        np.testing.assert_allclose(step * correction, arrays["w"].numpy() - weights, rtol=1e-9, atol=1e-12)
        weights = arrays["w"].numpy()


def reply(weights: NDArray[np.float64]) -> Message:
    content = RecordDict({"arrays": ArrayRecord({"w": Array(weights)}), "metrics": MetricRecord({"num-examples": 1})})
    with identity(1):
        return Message(content, reply_to=Message(RecordDict(), dst_node_id=2, message_type="train"))


@pytest.mark.parametrize("make", ALL)
def test_targets_do_not_mix_and_state_survives(make: Callable[[], ServerOptimizer]) -> None:
    alone, mixed = ready(make()), ready(make())
    for i, change in enumerate(changes(6)):
        if i == 3:
            state = unpack(*pack(mixed.state_dict()))
            mixed = ready(make())
            mixed.load_state_dict(state)
            assert equal(mixed.state_dict(), state)
        mixed.step("client", 2 * change)
        assert torch.equal(mixed.step(GLOBAL, change), alone.step(GLOBAL, change))


@pytest.mark.parametrize("make", ALL)
def test_a_change_of_sign_changes_the_step_alone(make: Callable[[], ServerOptimizer]) -> None:
    plus, minus = ready(make()), ready(make())
    for change in changes(4):
        assert torch.equal(plus.step(GLOBAL, change), -minus.step(GLOBAL, -change))


@pytest.mark.parametrize("make", ALL)
def test_buffers_move_as_they_are_told(make: Callable[[], ServerOptimizer]) -> None:
    optimizer = ready(make())
    for change in changes(3):
        assert torch.equal(optimizer.step(GLOBAL, change)[3:], change[3:])


@pytest.mark.parametrize("make", ALL)
def test_forgetting_starts_over(make: Callable[[], ServerOptimizer]) -> None:
    optimizer, fresh = ready(make()), ready(make())
    request = ForgetRequest("r", "client", clients=("0",))
    assert optimizer.forget(request).outcome == "not applicable"
    first, second = changes(2)
    optimizer.step(GLOBAL, first)
    assert optimizer.forget(request).outcome == "reset"
    assert torch.equal(optimizer.step(GLOBAL, second), fresh.step(GLOBAL, second))


def test_a_run_with_the_identity_is_the_run_without(
    run_experiment: Callable[..., Path], metrics_hash: Callable[[Path], str]
) -> None:
    setting = ["num_clients=3", "rounds_per_task=1", "scenario=joint", "strategy/projection=none"]
    none = run_experiment("none", *setting, "strategy/optimizer=none")
    sgd = [*setting, "strategy/optimizer=sgd", "strategy.optimizer.server.lr=1"]
    identity = run_experiment("identity", *sgd, "strategy.optimizer.server.momentum=0")
    halved = run_experiment("halved", *setting, "strategy/optimizer=sgd", "strategy.optimizer.server.lr=0.5")
    assert metrics_hash(identity) == metrics_hash(none)
    assert metrics_hash(halved) != metrics_hash(none)
