"""FOT's bases after an unlearning request: kept, taken out, rebuilt from Gram matrices, or asked for again."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fedcl.base.randomness import torch_generator
from fedcl.base.tree import equal, pack, unpack
from fedcl.contracts.requests import ForgetRequest
from fedcl.contracts.strategy import Event
from fedcl.contracts.view import Query, Response
from fedcl.models.flat import FlatModel
from fedcl.models.networks import MLP, build_model
from strategies.projection.fot import FOT
from tests.toy import configure, run_toy, write_files

CPU = torch.device("cpu")
EVERYBODY = ("a", "b", "c")


def model() -> FlatModel:
    return FlatModel(build_model(lambda: MLP(input_shape=(5,), heads=(3,), hidden=(4,)), seed=0))


class View:
    """What the server shows to a part, when rounds are played and when something is to be learned again."""

    def __init__(self, responses: dict[int, list[Response]] | None = None, clients: Sequence[str] = EVERYBODY) -> None:
        self.clients, self.device, self.past = tuple(clients), CPU, responses or {}
        self.asked: list[tuple[int, tuple[str, ...]]] = []

    def model_of(self, client: str) -> Tensor:
        return model().vector()

    def rng(self, purpose: str) -> torch.Generator:
        return torch_generator(purpose)

    def ask_past(self, query: Query, server_round: int) -> list[Response]:
        self.asked.append((server_round, tuple(query.models)))
        return [response for response in self.past[server_round] if response.client in query.models]


def layers() -> dict[str, int]:
    part = FOT()
    part.setup(model().spec)
    return {layer: weight.size // weight.shape[0] for layer, weight in part._weights.items()}


def gram(seed: int, client: str, layer: str, width: int) -> Tensor:
    """Return the Gram matrix of a few samples: of low rank, so that bases do not fill up."""
    rows = torch.randn(2, width, generator=torch_generator(seed, client, layer))
    return rows.T @ rows


def responses(seed: int, clients: Sequence[str]) -> list[Response]:
    return [
        Response(client, 2, {f"{layer}/gram": gram(seed, client, layer, width) for layer, width in layers().items()})
        for client in clients
    ]


def grown(mode: Any, who: Sequence[Sequence[str]], **settings: Any) -> FOT:
    """Return a part whose bases were extended once for each of ``who``."""
    settings = {"epsilon": 0.6, "epsilon_increment": 0.05, **settings}
    part = FOT(unlearn_basis=mode, **settings)
    part.setup(model().spec)
    for place, clients in enumerate(who):
        view: Any = View(clients=clients)
        (query,) = part.queries(Event("task_end", place, 2 * place, False), view)
        part.consume(query, responses(place, clients), view)
    return part


def request(*clients: str, **named: Any) -> ForgetRequest:
    return ForgetRequest("r", named.pop("scope", "client"), clients=clients, **named)


def projector(part: FOT, layer: str) -> Tensor:
    basis = part.basis(layer)
    return basis @ basis.T


def assert_same(part: FOT, other: FOT, tolerance: float = 1e-10) -> None:
    for layer in layers():
        torch.testing.assert_close(projector(part, layer), projector(other, layer), atol=tolerance, rtol=0)
        torch.testing.assert_close(part.basis(layer), other.basis(layer), atol=tolerance, rtol=0)
    assert part.epsilon == other.epsilon
    assert part.metrics()["extensions"] == other.metrics()["extensions"]


WHO = [("a", "b", "c"), ("a", "c"), ("c",), ("a", "b")]


@pytest.mark.parametrize("departing_client", EVERYBODY)
def test_grams_give_the_bases_of_a_run_without_the_client(departing_client: str) -> None:
    part = grown("keep_grams", WHO)
    never = without((departing_client,))
    with_all = {layer: projector(part, layer) for layer in layers()}
    resumed = grown("keep_grams", [])
    resumed.load_state_dict(unpack(*pack(part.state_dict())))
    assert equal(resumed.state_dict(), part.state_dict())
    residual = resumed.forget(request(departing_client))
    assert residual.outcome == "recomputed"
    assert "read with models of then" in residual.why
    assert_same(resumed, never)
    assert any(not torch.allclose(with_all[layer], projector(resumed, layer)) for layer in layers())
    assert departing_client not in resumed._memory.contributors()
    needle = (
        responses(0, [departing_client])[0].tensors["head/gram"].numpy().tobytes()
        if departing_client in WHO[0]
        else b"?"
    )
    assert not any(needle in tensor.numpy().tobytes() for tensor in pack(resumed.state_dict())[1].values())
    assert resumed.forget(request(departing_client)).outcome == "not applicable"


def test_grams_cost_what_the_metrics_say() -> None:
    part = grown("keep_grams", WHO)
    each = 4 * sum(width * width for width in layers().values())
    assert part.metrics()["gram_bytes"] == each * sum(len(who) for who in WHO)
    part.forget(request("c"))
    assert part.metrics()["gram_bytes"] == each * 5
    assert "gram_bytes" not in grown("keep", WHO).metrics()
    assert grown("keep", WHO).state_dict()["memory"] == {}


def test_two_leave_one_after_another() -> None:
    part = grown("keep_grams", WHO)
    part.forget(request("c"))
    part.forget(request("a"))
    assert_same(part, without(("a", "c")))


def without(departing_clients: Sequence[str]) -> FOT:
    part = FOT(unlearn_basis="keep_grams", epsilon=0.6, epsilon_increment=0.05)
    part.setup(model().spec)
    for place, clients in enumerate(WHO):
        left = [client for client in clients if client not in departing_clients]
        view: Any = View(clients=left)
        for query in part.queries(Event("task_end", place, 2 * place, False), view):
            part.consume(query, responses(place, left), view)
    return part


@pytest.mark.parametrize("departing_client", EVERYBODY)
def test_directions_of_a_task_are_dropped(departing_client: str) -> None:
    part = grown("drop_task", WHO)
    before = {layer: part.basis(layer).clone() for layer in layers()}
    ranks = [grown("drop_task", WHO[:count]) for count in range(5)]
    residual = part.forget(request(departing_client))
    stay = [place for place, who in enumerate(WHO) if departing_client not in who]
    for layer in layers():
        columns = [
            column
            for place in stay
            for column in range(ranks[place].basis(layer).shape[1], ranks[place + 1].basis(layer).shape[1])
        ]
        assert torch.equal(part.basis(layer), before[layer][:, columns])
    assert part.metrics()["extensions"] == len(stay)
    assert part.epsilon == pytest.approx(0.6 + 0.05 * len(stay))
    # what was found after, and outside of, something that is gone still tells of it
    assert residual.outcome == ("retained" if stay else "reset")
    assert f"{4 - len(stay)} extensions are dropped" in residual.why


def test_nothing_but_earlier_tasks_is_a_reset() -> None:
    part = grown("drop_task", [("a", "b"), ("a", "b", "c")])
    assert part.forget(request("c")).outcome == "reset"
    assert_same(part, grown("drop_task", [("a", "b")]))
    part = grown("drop_task", [("c",)])
    assert part.forget(request("c")).outcome == "reset"
    assert all(part.basis(layer).shape[1] == 0 for layer in layers())


def test_asked_again_the_bases_are_those_of_today() -> None:
    part = grown("recompute", WHO)
    today = {2 * place: responses(100 + place, EVERYBODY) for place in range(4)}
    idle: Any = View(today, clients=("a", "b"))
    part.relearn(idle)
    assert idle.asked == []  # not before it is needed
    assert part.forget(request("c")).outcome == "recomputed"
    part.load_state_dict(unpack(*pack(part.state_dict())))
    view: Any = View(today, clients=("a", "b"))
    part.relearn(view)
    assert view.asked == [(0, ("a", "b")), (2, ("a",)), (6, ("a", "b"))]
    expected = FOT(epsilon=0.6, epsilon_increment=0.05)
    expected.setup(model().spec)
    for place in (0, 1, 3):
        query = Query("subspace", {}, {})
        expected.consume(query, [a for a in today[2 * place] if a.client in WHO[place] and a.client != "c"], view)
    assert_same(part, expected)
    part.relearn(view)
    assert len(view.asked) == 3  # once a request


@pytest.mark.parametrize("mode", ["keep", "drop_task", "keep_grams", "recompute"])
def test_what_it_answers(mode: Any) -> None:
    assert FOT(unlearn_basis=mode).forget(request("a")).outcome == "not applicable"
    by_class = grown(mode, WHO).forget(request(scope="class", classes=(1,)))
    assert by_class.outcome == ("recomputed" if mode == "recompute" else "retained")
    stranger = grown(mode, WHO).forget(request("z"))
    assert stranger.outcome == {"keep": "retained", "recompute": "recomputed"}.get(mode, "not applicable")
    of_some = grown(mode, WHO).forget(request("b", scope="sample", samples=(3,)))
    assert of_some.outcome != "not applicable"
    if mode in ("drop_task", "keep_grams"):
        assert "unlearn_basis=recompute" in by_class.why


@pytest.mark.parametrize("settings", [{"method": "range_finder"}, {"method": "sketch"}, {"variant": "official"}])
def test_only_grams_can_be_kept(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"unlearn_basis=keep_grams: needs variant=corrected and method=gram"):
        FOT(unlearn_basis="keep_grams", **settings).setup(model().spec)


@pytest.mark.parametrize(
    ("mode", "scope"), [("keep_grams", "client"), ("recompute", "class"), pytest.param("drop_task", "client")]
)
def test_in_a_run(mode: str, scope: str, tmp_path: Path) -> None:
    """The real loop: clients are asked for past tasks again, and rounds go on."""
    files = write_files(tmp_path)
    what = {"client": "clients: ['3']", "class": "classes: [1]"}[scope]
    extra = [
        f"unlearning.requests=[{{id: a, scope: {scope}, {what}, at: {{round: 5}}}}]",
        f"unlearning.cache={tmp_path}",
        "unlearning.reference=false",
        f"strategy.projection.server.unlearn_basis={mode}",
    ]
    diary = run_toy(configure({"strategy/projection": "fot", "unlearner": "continue_without"}, files, CPU, *extra))
    assert diary.faults == []
    before, after = (diary.saved[n]["server"]["strategy"]["projection"] for n in (5, 6))
    memory = before["memory"]
    assert [memory[place]["server_round"] for place in sorted(memory)] == [1, 3]
    assert memory["0"]["clients"] == ["0", "1", "2", "3"]
    if mode == "drop_task":
        assert (after["memory"], after["bases"], after["extensions"]) == ({}, {}, 0)
        return
    left = {"client": ["0", "1", "2"], "class": ["0", "1", "2", "3"]}[scope]
    assert [after["memory"][place]["clients"] for place in ("0", "1")] == [left, left]
    assert after["extensions"] == 2
    assert after["stale"] is False
    assert not equal(after["bases"], before["bases"])
