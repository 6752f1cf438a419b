from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from clients.strategies.fedbn import FedBN as NormsStay
from fedcl.models.flat import Spec
from fedcl.models.networks import Output
from strategies.collaboration.fedavg import FedAvg
from strategies.collaboration.fedbn import FedBN
from strategies.collaboration.local import Local
from tests.strategies.federation import CLIENTS, Federation, close, network, samples


class Normed(nn.Module):
    """Batch norm, a layer, a second norm, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.BatchNorm1d(5)
        self.body = nn.Linear(5, 4)
        self.second = nn.LayerNorm(4)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Output:
        features = torch.relu(self.second(self.body(self.first(x))))
        return Output(self.head(features), features)


def norms_of(spec: Spec) -> Tensor:
    mask = torch.zeros(spec.size, dtype=torch.bool)
    for tensor in spec:
        if tensor.name.startswith(("first.", "second.")):
            mask[tensor.start : tensor.stop] = True
    return mask


def federation(part: Any = FedBN, half: Any = NormsStay, data: Callable[[str], Any] = samples) -> Federation:
    return Federation(part(), half, build=Normed, samples=data)


def test_norms_stay_and_the_rest_is_fedavgs() -> None:
    ours, plain = federation(), federation(FedAvg, None)
    norms, start = norms_of(ours.spec), ours.global_model
    assert int(norms.sum()) == 4 * 5 + 2 * 4  # scale, shift, two statistics; scale and shift
    ours.run()
    plain.run()
    assert torch.equal(ours.global_model[norms], start[norms])
    assert torch.equal(ours.global_model[~norms], plain.global_model[~norms])  # all began with the same norms
    assert not torch.equal(plain.global_model[norms], start[norms])


def test_a_clients_own_norms_go_on_from_visit_to_visit_and_never_travel() -> None:
    ours, alone = federation(), federation(Local, None)
    norms, received = norms_of(ours.spec), ours.global_model
    first, second = ours.visit("1")[0], alone.visit("1")[0]
    assert torch.equal(first.model[norms], received[norms])
    close(ours.own("1")["norms"], second.model[norms])
    kept = ours.own("1")["norms"].clone()
    ours.run(("0", "2"))
    alone.models["1"] = torch.where(norms, second.model, ours.global_model)  # what it should join
    alone.part.load_state_dict({"clients": ["1"]})
    update, expected = ours.visit("1")[0], alone.visit("1")[0]
    assert torch.equal(update.model[norms], ours.global_model[norms])
    close(update.model[~norms], expected.model[~norms])
    close(ours.own("1")["norms"], expected.model[norms])
    assert not torch.equal(kept, ours.own("1")["norms"])


def test_a_client_predicts_with_its_own_norms() -> None:
    ours = federation()
    ours.run()
    norms = norms_of(ours.spec)
    for client in CLIENTS:
        joined = ours.global_model.clone()
        joined[norms] = ours.own(client)["norms"]
        module = Normed().eval()
        for tensor in ours.spec:
            module.state_dict()[tensor.name].copy_(ours.spec.view(joined, tensor.name))
        x, y = samples(client)
        assert ours.accuracy(client) == float((module(x).logits.argmax(1) == y).double().mean())


def shifted(client: str) -> tuple[Tensor, Tensor]:
    """The same task, seen through a device of its own: another scale and another offset."""
    x, y = samples(client)
    return x * 4.0 ** int(client) + 10 * int(client), y


def test_clients_whose_inputs_are_scaled_differently_do_better_with_norms_of_their_own() -> None:
    ours, plain = federation(data=shifted), federation(FedAvg, None, data=shifted)
    for _ in range(12):
        ours.run()
        plain.run()
    mean = {name: sum(f.accuracy(c) for c in CLIENTS) / 3 for name, f in (("ours", ours), ("plain", plain))}
    assert mean["ours"] > mean["plain"] + 0.1


def test_a_model_needs_norms_and_something_else() -> None:
    with pytest.raises(ValueError, match="the model needs normalisation layers"):
        FedBN().setup(Spec.of(network()))
    with pytest.raises(ValueError, match="the model needs normalisation layers"):
        FedBN().setup(Spec.of(nn.BatchNorm1d(3)))
    FedBN().setup(Spec.of(Normed()))
