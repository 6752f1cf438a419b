from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from clients.strategies.fedprox import FedProx
from fedcl.base.tree import equal, pack, unpack
from fedcl.contracts.requests import ForgetRequest
from fedcl.contracts.strategy import GLOBAL, Update
from strategies.collaboration.fedat import FedAT, tier_of, tier_weights
from strategies.collaboration.fedavg import FedAvg
from tests.strategies.federation import Federation, close
from tests.toy import configure, run_toy, write_files


def test_tiers_by_hand() -> None:
    ages = [0.0, 0.0, 0.0, 2.5, 4.0, 4.0]
    assert [tier_of(age, ages, 3) for age in ages] == [0, 0, 0, 1, 2, 2]
    assert [tier_of(age, ages, 2) for age in ages] == [0, 0, 0, 1, 1, 1]
    assert [tier_of(3.0, [3.0] * 4, m) for m in (1, 2, 5)] == [0, 0, 0]


@pytest.mark.parametrize(
    ("counts", "weights"),
    [
        ([6, 3, 1], [0.1, 0.3, 0.6]),  # the slowest tier weighs most
        ([6, 0, 2], [0.25, 0.0, 0.75]),  # over those that have updates
        ([0, 4], [0.0, 1.0]),
        ([5], [1.0]),
    ],
)
def test_weights_across_tiers_by_hand(counts: list[int], weights: list[float]) -> None:
    assert tier_weights(counts) == pytest.approx(weights)


class View:
    """A server whose federation's spec and models are used."""

    def __init__(self) -> None:
        self.federation = Federation(FedAvg())
        self.spec = self.federation.spec
        self.global_model = self.federation.global_model


def late(view: Any, client: str, model: float, age: int, n: int = 10) -> Update:
    """Return an update whose model is the first global model plus a number."""
    start = view.federation.global_model
    return Update(client, 0, GLOBAL, 0, start, start + model, n, float(n), 0, 0, age)


def test_a_clients_age_is_the_mean_over_its_updates() -> None:
    view: Any = View()
    part = FedAT()
    for age in (0, 3, 6, 1):
        part.combine([late(view, "a", 1.0, age)], view)
    assert part.state_dict()["ages"] == {"a": [pytest.approx(2.5), 4]}


def test_tiers_are_averaged_apart_and_mixed_by_how_rarely_they_come() -> None:
    view: Any = View()
    start, part = view.global_model.double(), FedAT(tiers=2, retier_every=1)

    def step(*updates: Update) -> Tensor:
        new = part.combine(list(updates), view)[GLOBAL]
        view.global_model = new.float()
        return new

    # both fresh: one tier, FedAvg
    close(step(late(view, "a", 1.0, 0, 10), late(view, "b", 4.0, 0, 30)), start + 3.25)
    # b is late from now on: tier 0 is a (two updates by then), tier 1 is b (one)
    close(step(late(view, "a", 2.0, 0), late(view, "b", 8.0, 4)), start + (1 / 3) * 2 + (2 / 3) * 8)
    # a alone: three updates against one; what b sent last still counts, and counts more
    close(step(late(view, "a", 6.0, 0)), start + (1 / 4) * 6 + (3 / 4) * 8)
    assert part.metrics() == {
        **{"clients_0": 1, "updates_0": 3, "weight_0": 0.25},
        **{"clients_1": 1, "updates_1": 1, "weight_1": 0.75},
    }
    assert part.combine([], view) == {}


def test_tiers_are_looked_at_again_only_when_it_is_time() -> None:
    view: Any = View()
    part = FedAT(tiers=2, retier_every=3)
    part.combine([late(view, "a", 1.0, 0), late(view, "b", 1.0, 0)], view)
    for aggregation in (1, 2, 3):
        part.combine([late(view, "b", 1.0, 5)], view)
        assert part.metrics()["clients_1"] == (aggregation == 3)
    part.combine([late(view, "c", 1.0, 9)], view)  # a newcomer is placed at once
    assert part.metrics()["clients_1"] == 2


@pytest.mark.parametrize("tiers", [1, 4])
def test_while_nobody_is_late_it_is_fedavg_bit_for_bit(tiers: int) -> None:
    plain = Federation(FedAvg(), momentum=0.5)
    ours = Federation(FedAT(tiers=tiers), lambda: FedProx(mu=0.0), momentum=0.5)
    for present in (("0", "1", "2"), ("0", "2"), ("1",)):
        plain.run(present)
        ours.run(present)
        assert torch.equal(plain.global_model, ours.global_model)


def test_state_survives_and_forgetting_starts_over() -> None:
    view: Any = View()
    part, other = FedAT(tiers=2, retier_every=2), FedAT(tiers=2, retier_every=2)
    part.combine([late(view, "a", 1.0, 0), late(view, "b", 2.0, 3)], view)
    other.load_state_dict(unpack(*pack(part.state_dict())))
    for _ in range(2):
        updates = [late(view, "a", 5.0, 0), late(view, "b", 3.0, 1)]
        assert torch.equal(part.combine(updates, view)[GLOBAL], other.combine(updates, view)[GLOBAL])
    assert equal(part.state_dict(), other.state_dict())
    assert part.forget(ForgetRequest("r", "client", clients=("b",))).outcome == "reset"
    assert part.metrics() == dict.fromkeys(part.metrics(), 0.0) | {"clients_0": 1.0}
    close(part.combine([late(view, "a", 5.0, 0)], view)[GLOBAL], view.global_model.double() + 5)


@pytest.mark.parametrize("mode", ["async.buffer=2", "async.deadline=0.15"])
def test_the_slow_devices_end_in_the_slow_tier_and_a_resumed_run_agrees(mode: str, tmp_path: Path) -> None:
    extra = [mode, "rounds_per_task=12", "strategy.collaboration.server.retier_every=4"]
    choices = {"strategy/collaboration": "fedat", "devices": "trace", "scenario": "joint"}
    files = write_files(tmp_path)
    (tmp_path / "devices.csv").write_text("client,speed\n0,1.0\n1,0.2\n2,1.0\n3,0.1\n")
    cfg = configure(choices, files, torch.device("cpu"), *extra)
    diary = run_toy(cfg)
    assert diary.faults == []
    rest = run_toy(cfg, start=diary.saved[6])
    assert rest.hashes == diary.hashes[6:]
    part = diary.saved[-1]["server"]["strategy"]["collaboration"]
    assert part["tier"]["1"] > part["tier"]["0"]
    assert part["tier"]["3"] > part["tier"]["2"]
    assert part["counts"][0] > part["counts"][-1] > 0
