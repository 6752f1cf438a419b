from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from clients.strategies.ifca import IFCA as Chooses
from fedcl.base.randomness import torch_generator
from fedcl.base.tree import equal, pack, unpack
from fedcl.config.compose import compose
from fedcl.contracts.requests import ForgetRequest
from fedcl.contracts.strategy import GLOBAL, Target, Update
from fedcl.data.dataset import Partition
from fedcl.models.flat import Spec, TensorSpec
from fedcl.runs.setup import Setup, make_server
from fedcl.server.loop import Server
from fedcl.server.strategy import Pipeline
from fedcl.simulation.backend import open_backend
from strategies.collaboration.fedavg import FedAvg
from strategies.collaboration.ifca import IFCA, shuffled
from tests.strategies.federation import Federation, close, descend, loss_at
from tests.toy import Diary

SPEC = Spec(
    [
        TensorSpec("body.weight", (4,), 0, 4, "parameter", None),
        TensorSpec("body.bias", (2,), 4, 6, "parameter", None),
        TensorSpec("bn.running_mean", (2,), 6, 8, "buffer", None),
    ]
)
START = torch.tensor([1.0, 2.0, 3.0, 4.0, 0.5, 0.5, 7.0, 8.0])


@dataclass
class View:
    models: dict[Target, Tensor] = field(default_factory=lambda: {GLOBAL: START})
    spec: Spec = SPEC
    clients: tuple[str, ...] = ("0", "1", "2", "3")
    version: int = 0

    @property
    def global_model(self) -> Tensor:
        return self.models[GLOBAL]

    def model_at(self, target: Target) -> Tensor:
        return self.models.get(target, self.global_model)

    def rng(self, purpose: str) -> torch.Generator:
        return torch_generator("view", self.version, purpose)


def run_toy(part: IFCA, view: View, replies: dict[str, tuple[float, int, int]]) -> None:
    """Let each client send the model it was sent plus a number: client -> (number, choice, samples)."""
    pipeline = Pipeline(collaboration=part)
    pipeline.setup(SPEC)
    updates = []
    for client, (change, choice, n) in replies.items():
        target, _ = part.message_for(client, view)  # type: ignore[arg-type]
        base = view.model_at(target)
        payload = {"choice": torch.tensor([choice])}
        updates.append(Update(client, 0, target, 0, base, base + change, n, float(n), 0, 0, payload=payload))
    view.models |= pipeline.aggregate(updates, view)  # type: ignore[arg-type]
    view.version += 1


# -- the server, by hand --------------------------------------------------------------------------------------------


def test_each_cluster_is_the_mean_of_those_who_chose_it() -> None:
    part, view = IFCA(clusters=2), View()
    target, sent = part.message_for("0", view)  # type: ignore[arg-type]
    assert target == "cluster-0"
    start = sent["clusters"][0]
    run_toy(part, view, {"0": (1.0, 0, 10), "1": (4.0, 0, 30), "2": (8.0, 1, 10)})
    close(view.model_at("cluster-0"), START + (10 * 1 + 30 * 4) / 40)
    close(view.model_at("cluster-1"), start + 8)
    close(view.global_model, (2 * view.model_at("cluster-0") + view.model_at("cluster-1")) / 3)
    assert [part.message_for(c, view)[0] for c in "0123"] == ["cluster-0", "cluster-0", "cluster-1", "cluster-0"]  # type: ignore[arg-type]
    assert part.metrics() == {"cluster_0": 2, "cluster_1": 1, "switched": 1 / 3}
    # a cluster that nobody chose stays, and a choice counts from the client's own cluster on
    before = view.model_at("cluster-1")
    run_toy(part, view, {"2": (2.0, 1, 10)})
    assert view.model_at("cluster-1") is before
    assert part.message_for("2", view)[0] == "cluster-0"  # type: ignore[arg-type]
    close(view.global_model, view.model_at("cluster-0"))


def test_the_others_come_in_cyclic_order_and_as_one_object() -> None:
    part, view = IFCA(clusters=3), View()
    run_toy(part, view, {"0": (1.0, 0, 1), "1": (2.0, 1, 1), "2": (3.0, 2, 1), "3": (3.0, 2, 1)})
    models = [view.model_at(f"cluster-{j}") for j in range(3)]
    for own, client in enumerate("012"):
        sent = part.message_for(client, view)[1]["clusters"]  # type: ignore[arg-type]
        assert torch.equal(sent, torch.stack([models[(own + 1) % 3], models[(own + 2) % 3]]))
    again = part.message_for("3", view)[1]["clusters"]  # type: ignore[arg-type]
    assert again is part.message_for("2", view)[1]["clusters"]  # type: ignore[arg-type]
    view.models["cluster-0"] = models[0] + 1  # as an unlearner edits it
    assert torch.equal(part.message_for("2", view)[1]["clusters"][0], models[0] + 1)  # type: ignore[arg-type]


@pytest.mark.parametrize("spread", [0.1, 0.5, 1.0])
def test_a_start_has_the_first_ones_mean_and_spread(spread: float) -> None:
    spec = Spec(
        [
            TensorSpec("w", (5000,), 0, 5000, "parameter", None),
            TensorSpec("norm.weight", (8,), 5000, 5008, "parameter", None),
            TensorSpec("stat", (30,), 5008, 5038, "buffer", None),
        ]
    )
    model = torch.cat([torch.rand(5000, generator=torch_generator("w")) - 0.4, torch.ones(8), torch.arange(30.0)])
    start = shuffled(model, spec, spread, torch_generator("s"))
    assert torch.equal(start[5000:], model[5000:])
    old, new = model[:5000], start[:5000]
    assert float(new.mean()) == pytest.approx(float(old.mean()), abs=1e-6)
    assert float(new.std()) == pytest.approx(float(old.std()), rel=0.05)
    correlation = float(torch.corrcoef(torch.stack([old, new]))[0, 1])
    assert correlation == pytest.approx((1 - spread**2) ** 0.5, abs=0.05)
    if spread == 1:
        assert torch.equal(new.sort().values, old.sort().values)


def test_state_survives_before_and_after_the_first_round() -> None:
    part, view = IFCA(clusters=2), View()
    first = part.message_for("0", view)[1]["clusters"]  # type: ignore[arg-type]
    view.version = 9  # whatever it would draw now
    for _ in range(2):
        other = IFCA(clusters=2)
        other.load_state_dict(unpack(*pack(part.state_dict())))
        assert equal(other.state_dict(), part.state_dict())
        ours, theirs = (p.message_for("1", view) for p in (part, other))  # type: ignore[arg-type]
        assert ours[0] == theirs[0]
        assert torch.equal(ours[1]["clusters"], theirs[1]["clusters"])
        run_toy(part, view, {"0": (1.0, 0, 1), "1": (1.0, 1, 1)})
    assert not torch.equal(part.message_for("0", view)[1]["clusters"], first)  # type: ignore[arg-type]


def test_forgetting_drops_choices() -> None:
    part, view = IFCA(clusters=2), View()
    run_toy(part, view, {"0": (1.0, 1, 1), "1": (1.0, 1, 1)})
    assert part.forget(ForgetRequest("r", "client", clients=("0",))).outcome == "erased"
    assert [part.message_for(c, view)[0] for c in "01"] == ["cluster-0", "cluster-1"]  # type: ignore[arg-type]
    assert part.forget(ForgetRequest("r", "client", clients=("0",))).outcome == "not applicable"
    assert part.forget(ForgetRequest("r", "class")).outcome == "reset"


# -- with its clients -----------------------------------------------------------------------------------------------


def test_a_client_trains_the_model_of_least_loss_and_sends_its_change() -> None:
    federation = Federation(IFCA(clusters=3), Chooses)
    for client in federation.clients:
        target, sent = federation.part.message_for(client, federation)  # type: ignore[arg-type]
        received = federation.model_of(client)
        candidates = [received, *sent["clusters"]]
        losses = [loss_at(vector, client) for vector in candidates]
        update, reply = federation.visit(client)
        choice = int(reply.payload["choice"])
        assert (target, choice) == ("cluster-0", int(np.argmin(losses)))
        trained = descend(candidates[choice], client, 3)
        close(update.delta, trained - candidates[choice].double())
        if choice == 0:
            close(update.model, trained)
    assert update.payload.keys() == {"choice"}


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_one_cluster_is_fedavg_bit_for_bit(momentum: float) -> None:
    plain = Federation(FedAvg(), momentum=momentum)
    ours = Federation(IFCA(clusters=1), Chooses, momentum=momentum)
    for present in (("0", "1", "2"), ("0", "2"), ("1",)):
        plain.run(present)
        ours.run(present)
        assert torch.equal(plain.global_model, ours.global_model)
        assert torch.equal(plain.global_model, ours.model_of("1"))


# -- two groups that disagree, in the real loop ---------------------------------------------------------------------


def disagreeing(setup: Setup) -> Setup:
    """Let the second half of the clients call class y (9 - y), in training and in their own tests."""
    dataset, half = setup.dataset, len(setup.clients) // 2
    y, flipped = dataset.train.y.copy(), dataset.num_classes - 1 - dataset.test.y
    for part in setup.partition.train[half:]:
        y[part] = dataset.num_classes - 1 - y[part]
    test = replace(
        dataset.test,
        x=np.concatenate([dataset.test.x, dataset.test.x]),
        y=np.concatenate([dataset.test.y, flipped]),
    )
    everything = np.arange(len(flipped))
    tests = (everything,) * half + (everything + len(flipped),) * half
    both = replace(dataset, train=replace(dataset.train, y=y), test=test)
    return replace(setup, dataset=both, partition=Partition(setup.partition.train, tests))


def run(*extra: str) -> tuple[Server, Diary]:
    overrides = ["data=digits", "data/partition=iid", "scenario=joint", "model=mlp", "model.hidden=[32]", "device=cpu"]
    overrides += ["strategy/projection=none", "backend=inline", "compare_with=null", "num_clients=6"]
    overrides += ["rounds_per_task=8", "evaluation.every=0", "evaluation.personal=true", *extra]
    cfg = compose(overrides)
    setup, diary = disagreeing(Setup.of(cfg)), Diary()
    with open_backend(cfg, setup.dataset, setup.partition) as backend:
        recorder: Any = diary
        server = make_server(cfg, setup, backend, recorder)
        server.run(lambda _: None)
    assert diary.faults == []
    return server, diary


def personal(diary: Diary) -> list[float]:
    return [row["value"] for row in diary.rows if row["phase"] == "personal"]


def test_two_groups_with_conflicting_labels_end_in_two_clusters() -> None:
    server, diary = run("strategy/collaboration=ifca")
    clusters = [server.strategy.target_of(client, server) for client in server.clients]
    assert len(set(clusters[:3])) == len(set(clusters[3:])) == 1
    assert clusters[0] != clusters[3]
    assert min(personal(diary)) > 0.75
    _, averaged = run("strategy/collaboration=fedavg")
    assert max(personal(averaged)) < 0.7
