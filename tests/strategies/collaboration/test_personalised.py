from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
import torch

from clients.strategies.apfl import APFL
from clients.strategies.ditto import Ditto
from clients.strategies.fedavg_ft import FineTuned
from clients.strategies.fedper import FedPer as HeadStays
from clients.strategies.fedper import FedRep
from clients.strategies.pfedme import PFedMe
from clients.strategies.qfedavg import QFedAvg as SaysLoss
from fedcl.base.randomness import torch_generator
from fedcl.base.tree import equal, pack, unpack
from fedcl.contracts.learner import Plugin
from fedcl.contracts.requests import ForgetRequest
from fedcl.models.flat import Spec, TensorSpec
from fedcl.server.strategy import check_payloads
from strategies.collaboration.fedamp import FedAMP, attention
from strategies.collaboration.fedavg import FedAvg
from strategies.collaboration.fedper import FedPer
from strategies.collaboration.local import Local
from strategies.collaboration.qfedavg import QFedAvg
from tests.strategies.federation import (
    CLIENTS,
    LR,
    Federation,
    accuracy_of,
    close,
    descend,
    gradient,
    head_of,
    loss_at,
)

SHARED_BITS: list[Callable[[], Plugin]] = [FineTuned, Ditto, APFL, SaysLoss]


@pytest.mark.parametrize("half", SHARED_BITS)
def test_the_shared_model_is_fedavgs_bit_for_bit(half: Callable[[], Plugin]) -> None:
    plain, ours = Federation(FedAvg(), momentum=0.5), Federation(FedAvg(), half, momentum=0.5, measured=True)
    for present in (CLIENTS, ("0", "2"), CLIENTS):
        plain.run(present)
        ours.run(present)
        assert torch.equal(plain.global_model, ours.global_model)


# -- local ----------------------------------------------------------------------------------------------------------


def test_local_is_training_alone() -> None:
    federation = Federation(Local())
    start = federation.global_model
    federation.run(("0", "1"))
    assert torch.equal(federation.model_of("2"), start)  # who comes late starts where the others did
    federation.run(("0", "2"))
    for client, visits in (("0", 2), ("1", 1), ("2", 1)):
        close(federation.model_of(client), descend(start, client, 3 * visits))
    close(federation.global_model, (federation.model_of("0") + federation.model_of("2")) / 2)
    assert federation.accuracy("0") == accuracy_of(federation.model_of("0"), "0")


def test_local_remembers_who_has_a_model() -> None:
    federation = Federation(Local())
    federation.run(("1",))
    other = Local()
    other.load_state_dict(unpack(*pack(federation.part.state_dict())))
    assert other.message_for("0", federation)[0] == "0"  # type: ignore[arg-type]
    assert other.forget(ForgetRequest("r", "client")).outcome == "not applicable"


# -- fine-tuning ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("epochs", [0, 1, 40])
def test_fine_tuning_is_gradient_descent_from_what_was_received(epochs: int) -> None:
    federation = Federation(FedAvg(), lambda: FineTuned(epochs=epochs))
    federation.run()
    for client in CLIENTS:
        assert federation.accuracy(client) == accuracy_of(descend(federation.global_model, client, epochs), client)


def test_fine_tuning_helps_and_leaves_no_trace() -> None:
    federation = Federation(FedAvg(), lambda: FineTuned(epochs=60), measured=True)
    _, reply = federation.visit("2")
    plain = Federation(FedAvg(), measured=True)
    _, expected = plain.visit("2")
    assert reply.metrics["accuracy_trained"] == expected.metrics["accuracy_trained"]
    assert reply.metrics["accuracy_received"] > expected.metrics["accuracy_received"]
    assert federation.own("2") == {}


# -- heads that stay ------------------------------------------------------------------------------------------------


def test_fedper_by_hand() -> None:
    federation = Federation(FedPer(), HeadStays)
    start, head = federation.global_model, head_of(federation.spec)
    update, _ = federation.visit("0")
    close(update.model[~head], descend(start, "0", 3)[~head])
    assert torch.equal(update.model[head], start[head])  # the client's own head does not travel
    close(federation.own("0")["heads"], descend(start, "0", 3)[head])
    federation = Federation(FedPer(), HeadStays)
    federation.run()
    assert torch.equal(federation.global_model[head], start[head])
    trained = [descend(start, client, 3) for client in CLIENTS]
    sizes = torch.tensor([6.0, 9.0, 12.0], dtype=torch.float64)
    close(federation.global_model[~head], ((sizes / sizes.sum()) @ torch.stack(trained))[~head])
    joined = torch.where(head, trained[1].float(), federation.global_model)
    assert federation.accuracy("1") == accuracy_of(joined, "1")
    body_1 = federation.global_model
    update, _ = federation.visit("1")
    close(update.model[~head], descend(torch.where(head, trained[1], body_1.double()), "1", 3)[~head])


@pytest.mark.parametrize(("momentum", "weight_decay"), [(0.0, 0.0), (0.9, 0.1)])
def test_fedrep_trains_the_head_then_the_body(momentum: float, weight_decay: float) -> None:
    federation = Federation(FedPer(), lambda: FedRep(head_epochs=4), momentum=momentum, weight_decay=weight_decay)
    start, head = federation.global_model, head_of(federation.spec)
    update, _ = federation.visit("2")
    after_head = descend(start, "2", 4, head)
    close(federation.own("2")["heads"], after_head[head])  # nothing moved it while the body learned
    assert torch.equal(update.model[head], start[head])
    if not momentum:
        close(update.model[~head], descend(after_head, "2", 3, ~head)[~head])
    assert not torch.equal(update.model[~head], start[~head])


def test_heads_of_tasks_stay_too_and_a_model_needs_both() -> None:
    body, head = TensorSpec("hidden.0.w", (2,), 0, 2, "parameter", None), "heads.1.weight"
    assert FedPer().shares(body)
    assert not FedPer().shares(TensorSpec(head, (2,), 2, 4, "parameter", 1))
    assert FedPer().shares(TensorSpec("forehead.w", (2,), 2, 4, "parameter", None))
    with pytest.raises(ValueError, match="the model needs tensors"):
        FedPer().setup(Spec([body]))


# -- personal models beside the shared one --------------------------------------------------------------------------


@pytest.mark.parametrize("weight", [0.0, 0.5])
def test_ditto_by_the_paper(weight: float) -> None:
    federation = Federation(FedAvg(), lambda: Ditto(weight=weight))
    personal = {client: federation.global_model.double() for client in CLIENTS}
    for _ in range(2):
        received = federation.global_model.double()
        federation.run()
        for client, v in personal.items():
            for _ in range(3):
                v = v - LR * (gradient(v, client) + weight * (v - received))
            personal[client] = v
            close(federation.own(client)["personal"], v)
            assert federation.accuracy(client) == accuracy_of(v, client)


def test_ditto_without_pull_is_local_training() -> None:
    ditto, alone = Federation(FedAvg(), lambda: Ditto(weight=0.0)), Federation(Local())
    for _ in range(3):
        ditto.run()
        alone.run()
    for client in CLIENTS:
        torch.testing.assert_close(ditto.own(client)["personal"], alone.model_of(client), rtol=1e-5, atol=1e-6)


def test_ditto_before_its_first_visit_uses_what_it_receives() -> None:
    federation = Federation(FedAvg(), Ditto)
    assert federation.accuracy("1") == accuracy_of(federation.global_model, "1")


def test_apfl_by_the_paper() -> None:
    federation = Federation(FedAvg(), lambda: APFL(alpha=0.6))
    personal = {client: (federation.global_model.double(), 0.6) for client in CLIENTS}
    for _ in range(3):
        received = federation.global_model.double()
        federation.run()
        for client, (v, alpha) in personal.items():
            w = received
            for step in range(3):
                slope = gradient(alpha * v + (1 - alpha) * w, client)
                new_v = v - LR * alpha * slope
                if step == 0:
                    alpha = min(max(alpha - LR * float((v - w) @ slope), 0.0), 1.0)
                v, w = new_v, w - LR * gradient(w, client)
            personal[client] = (v, alpha)
            close(federation.own(client)["personal"], v)
            assert float(federation.own(client)["alpha"]) == pytest.approx(alpha, abs=1e-5)
            mixture = alpha * v + (1 - alpha) * federation.global_model
            assert federation.accuracy(client) == accuracy_of(mixture, client)
    assert {alpha for _, alpha in personal.values()} != {0.6}


def test_apfl_at_its_ends_is_local_training_and_fedavg() -> None:
    ends = {}
    for alpha in (0.0, 1.0):
        ends[alpha] = Federation(FedAvg(), lambda alpha=alpha: APFL(alpha=alpha, adaptive=False))
        ends[alpha].run()
        ends[alpha].run()
        assert "alpha" not in ends[alpha].own("0")
    start = Federation(FedAvg()).global_model
    assert torch.equal(ends[0.0].own("1")["personal"], start)
    close(ends[1.0].own("1")["personal"], descend(start, "1", 6))
    assert ends[0.0].accuracy("1") == accuracy_of(ends[0.0].global_model, "1")


def test_pfedme_by_the_paper() -> None:
    federation = Federation(FedAvg(weighting="uniform"), lambda: PFedMe(weight=2.0, inner_lr=0.1, inner_steps=3))
    for _ in range(2):
        received = federation.global_model.double()
        federation.run()
        moved = []
        for client in CLIENTS:
            w = theta = received
            for _ in range(3):
                for _ in range(3):
                    theta = theta - 0.1 * (gradient(theta, client) + 2.0 * (theta - w))
                w = w - LR * 2.0 * (w - theta)
            moved.append(w)
            close(federation.own(client)["personal"], theta)
            assert federation.accuracy(client) == accuracy_of(theta, client)
        close(federation.global_model, torch.stack(moved).mean(0))


def test_pfedme_converges_to_the_envelope() -> None:
    # where theta minimises F + lambda/2 |theta - w|^2, grad F(theta) = lambda (w - theta)
    federation = Federation(FedAvg(), lambda: PFedMe(weight=2.0, inner_lr=0.1, inner_steps=400), epochs=1)
    start = federation.global_model.double()
    federation.visit("1")
    theta = federation.own("1")["personal"].double()
    torch.testing.assert_close(gradient(theta, "1"), 2.0 * (start - theta), rtol=1e-3, atol=1e-5)


# -- FedAMP ---------------------------------------------------------------------------------------------------------


def test_attention_by_hand() -> None:
    models = torch.tensor([[0.0], [1.0], [3.0]], dtype=torch.float64)
    xi = attention(models, sigma=2.0, alpha=0.5)
    near, far, farther = (0.25 * math.exp(-d / 2) for d in (1, 4, 9))
    expected = [[1 - near - farther, near, farther], [near, 1 - near - far, far], [farther, far, 1 - far - farther]]
    torch.testing.assert_close(xi, torch.tensor(expected, dtype=torch.float64))


def test_attention_is_a_mixture_whatever_alpha() -> None:
    models = torch.randn(6, 4, generator=torch_generator("amp"), dtype=torch.float64)
    xi = attention(models, sigma=3.0, alpha=100.0)
    assert float(xi.min()) >= 0
    torch.testing.assert_close(xi.sum(1), torch.ones(6, dtype=torch.float64))
    torch.testing.assert_close(attention(models, sigma=1e-3, alpha=1.0), torch.eye(6, dtype=torch.float64))


def test_fedamp_mixes_and_remembers_absent_clients() -> None:
    federation = Federation(FedAMP(sigma=1.0, alpha=0.4))
    federation.run()
    first = {client: federation.model_of(client) for client in CLIENTS}
    kept = dict(federation.part.state_dict()["models"])
    federation.run(("0",))
    models = torch.stack([federation.part.state_dict()["models"][client] for client in CLIENTS]).double()
    assert torch.equal(models[1:], torch.stack([kept["1"], kept["2"]]).double())
    expected = attention(models, 1.0, 0.4) @ models
    for client, u in zip(CLIENTS, expected, strict=True):
        close(federation.model_of(client), u)
        assert not torch.equal(federation.model_of(client), first[client])
    assert 0 < federation.part.metrics()["own_share"] < 1


def test_fedamp_without_attraction_is_local_training() -> None:
    apart, alone = Federation(FedAMP(sigma=1e-9)), Federation(Local())
    for _ in range(2):
        apart.run()
        alone.run()
    assert all(torch.equal(apart.model_of(client), alone.model_of(client)) for client in CLIENTS)


def test_fedamp_survives_and_forgets() -> None:
    federation = Federation(FedAMP())
    federation.run()
    state = unpack(*pack(federation.part.state_dict()))
    other = FedAMP()
    other.load_state_dict(state)
    assert equal(other.state_dict(), state)
    assert other.forget(ForgetRequest("r", "client", clients=("1",))).outcome == "retained"
    assert list(other.state_dict()["models"]) == ["0", "2"]
    assert other.forget(ForgetRequest("r", "client", clients=("1",))).outcome == "not applicable"
    assert other.forget(ForgetRequest("r", "class", classes=(1,))).outcome == "reset"
    assert other.state_dict()["models"] == {}


# -- q-FedAvg -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("q", [0.0, 0.5, 1.0, 3.0])
def test_qfedavg_by_the_paper(q: float) -> None:
    federation = Federation(QFedAvg(q=q, lipschitz=1 / LR), SaysLoss)
    check_payloads(QFedAvg.payloads, [SaysLoss()])
    for _ in range(2):
        start = federation.global_model.double()
        federation.run()
        numerator, denominator = torch.zeros_like(start), 0.0
        for client in CLIENTS:
            loss = loss_at(start, client)
            scaled = (start - descend(start, client, 3)) / LR
            numerator += loss**q * scaled
            denominator += q * loss ** (q - 1) * float(scaled.square().sum()) + loss**q / LR
        close(federation.global_model, start - numerator / denominator)


def test_qfedavg_with_q_zero_is_the_plain_mean() -> None:
    ours, plain = Federation(QFedAvg(q=0.0), SaysLoss), Federation(FedAvg(weighting="uniform"))
    for _ in range(2):
        ours.run()
        plain.run()
    torch.testing.assert_close(ours.global_model, plain.global_model, rtol=1e-6, atol=1e-7)


# -- all ------------------------------------------------------------------------------------------------------------


SETTING = [
    "scenario=joint",
    "strategy/projection=none",
    "data/partition=dirichlet_client",
    "data.partition.train_size=60",
    "data.partition.test_size=40",
    "num_clients=5",
    "rounds_per_task=4",
    "client.optimizer.lr=0.1",
    "evaluation.personal=true",
    "evaluation.every=0",
    "checkpoint.every=0",
]


def test_personal_models_beat_the_shared_one(run_experiment: Callable[..., Path]) -> None:
    def personal(name: str) -> float:
        folder = run_experiment(name, *SETTING, f"strategy/collaboration={name}")
        table = pd.read_parquet(folder / "metrics.parquet")
        return float(table[table["phase"] == "personal"]["value"].mean())

    shared = personal("fedavg")
    assert all(personal(name) > shared + 0.05 for name in ("local", "fedavg_ft", "fedper", "ditto"))
