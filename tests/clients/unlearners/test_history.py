"""Unlearners that remember the run: FedEraser, and SIFU with its bounds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from clients.unlearners.federaser import FedEraser, calibrated
from clients.unlearners.local_rounds import LocalTasks, of_task
from clients.unlearners.sensitivity import Path as Track
from clients.unlearners.sensitivity import Round, budget
from clients.unlearners.sifu import SIFU, is_linear, noisy
from fedcl.base.randomness import torch_generator
from fedcl.base.tree import equal, pack, unpack
from fedcl.contracts.fields import Form
from fedcl.contracts.learner import LocalTraining
from fedcl.contracts.requests import ForgetRequest
from fedcl.contracts.strategy import GLOBAL, LocalWork, Update
from fedcl.contracts.unlearner import Samples, UnlearnContext
from fedcl.contracts.view import Response
from fedcl.messages import Reply
from fedcl.models.flat import FlatModel
from fedcl.models.networks import MLP, build_model
from fedcl.scenario.streams import ClassIncremental
from fedcl.server.validation import Expected, rejection
from tests.clients.backdoors import served

CPU = torch.device("cpu")


def linear_model(seed: int = 0, hidden: Sequence[int] = ()) -> FlatModel:
    return FlatModel(build_model(lambda: MLP(input_shape=(3,), heads=(2,), hidden=hidden), seed=seed))


def samples(seed: int, count: int, task: int = 0) -> Samples:
    x = torch.randn(count, 3, generator=torch_generator("samples", seed))
    return Samples(x, (x[:, 0] > 0).long(), None, torch.full((count,), task))


@dataclass
class Clients:
    """The clients of a run without a server: what they hold of two tasks, and the rounds they have been asked for."""

    model: FlatModel
    held: dict[str, Samples]
    training: LocalTraining = field(default_factory=lambda: LocalTraining(epochs=2, batch_size=4, lr=0.1))
    method: FedEraser | SIFU = field(default_factory=FedEraser)
    clients: tuple[str, ...] = ("a", "b")
    asked: list[tuple[str, ...]] = field(default_factory=list)
    sent: list[Tensor] = field(default_factory=list)
    silent: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        self.initial = self.model.vector()
        self.spec, self.device, self.owners, self.server_round = self.model.spec, CPU, (), 0
        self.global_model = self.initial

    def rng(self, purpose: str) -> torch.Generator:
        return torch_generator("server", purpose)

    def ask(self, step: str, models: Mapping[str, Tensor], response: Form, **args: Any) -> list[Response]:
        self.asked.append(tuple(models))
        self.sent.append(next(iter(models.values())).clone())
        responses, expected = [], Expected.of("unlearn", self.spec, response)
        for client, model in models.items():
            done = self.train(client, model, step, args)
            assert rejection(Reply(done.num_examples, payload=done.tensors), expected) is None
            if done.num_examples and client not in self.silent:
                responses.append(Response(client, done.num_examples, done.tensors))
        return responses

    def train(self, client: str, model: Tensor, step: str, args: dict[str, Any]) -> Any:
        held = self.held[client]
        self.model.load(model)
        context = UnlearnContext(
            self.model, model, held.at(torch.zeros(len(held), dtype=torch.bool)), held, (), self.training, client,
            0, 0, 2, {}, args,
        )  # fmt: skip
        return self.method.local(context, step)

    def round(self, clients: Sequence[str], server_round: int, task: int = 0) -> list[Update]:
        """Train a round of FedAvg, show it to the method, and go on from its mean."""
        before, updates = self.global_model, []
        args = {"task": task, "columns": [], "epochs": self.training.epochs, "place": 100 + server_round}
        for client in clients:
            done = self.train(client, before, "calibrate" if isinstance(self.method, FedEraser) else "train", args)
            count = done.num_examples
            model = done.tensors["model"]
            updates.append(Update(client, 0, GLOBAL, 0, before, model, count, count, task, 0))
        total = sum(update.num_examples for update in updates)
        mean = torch.stack([u.num_examples / total * u.model.double() for u in updates]).sum(0)
        self.global_model = mean.float()
        view: Any = self
        self.method.observe(updates, before, view)
        return updates

    def unlearn(self, *departing_clients: str) -> Tensor:
        self.clients = tuple(client for client in self.clients if client not in departing_clients)
        request, view = ForgetRequest("r", "client", clients=departing_clients), cast(Any, self)
        models = self.method.unlearn([request], {GLOBAL: self.global_model, "x": self.global_model}, view)
        assert set(models) == {GLOBAL, "x"}
        assert torch.equal(models[GLOBAL], models["x"])
        self.global_model = models[GLOBAL]
        return models[GLOBAL]


STREAM = ClassIncremental(num_classes=2, input_shape=(3,), seed=0, num_tasks=1)
TRAINING = LocalTraining(epochs=2, batch_size=4, lr=0.1)


def bound(method: Any, clients: Clients, plain_loss: bool = True) -> Any:
    method.bind(LocalWork(clients.model, clients.training, STREAM, (3,), plain_loss=plain_loss))
    return method


def world(method: Any, training: LocalTraining = TRAINING, hidden: Sequence[int] = ()) -> Clients:
    held = {name: samples(seed, count) for seed, (name, count) in enumerate((("a", 12), ("b", 8), ("c", 16)))}
    clients = Clients(linear_model(hidden=hidden), held, training, method, ("a", "b", "c"))
    bound(method, clients)
    return clients


def request(*clients: str) -> ForgetRequest:
    return ForgetRequest("r", "client", clients=clients)


def moved(method: Any) -> Any:
    """Return a new unlearner that holds what ``method`` does, carried over as a checkpoint does."""
    other = type(method)()
    other.load_state_dict(unpack(*pack(method.state_dict())))
    assert equal(other.state_dict(), method.state_dict())
    return other


# -- lessons ----------------------------------------------------------------------------------------------------------


def test_a_lesson_has_the_columns_of_its_time() -> None:
    stream = ClassIncremental(num_classes=6, input_shape=(3,), seed=0, num_tasks=3)
    local_tasks = LocalTasks(stream)
    taken = []
    for task in (0, 0, 1):
        update: Any = type("U", (), {"client": "a", "task": task})()
        taken.append(local_tasks.take(update))
    assert [len(local_task.columns) for local_task in taken] == [2, 2, 4]
    assert taken[2].columns == tuple(sorted(stream.train_task(0).columns + stream.train_task(1).columns))
    again = LocalTasks(stream)
    again.load(local_tasks.state())
    assert again.take(update) == taken[2]
    again.drop("a")
    assert len(again.take(update).columns) == 2


def test_samples_of_a_task_choose_among_its_columns() -> None:
    both = Samples.join([samples(0, 3, task=0), samples(1, 2, task=1)])
    chosen = of_task(both, 1, [0, 2], 4)
    assert torch.equal(chosen.x, samples(1, 2).x)
    assert chosen.mask is not None
    assert chosen.mask.tolist() == [[True, False, True, False]] * 2
    assert of_task(both, 1, [], 4).mask is None
    assert len(of_task(both, 2, [], 4)) == 0
    with pytest.raises(ValueError, match="do not say in which task"):
        of_task(Samples(both.x, both.y), 0, [], 4)


# -- FedEraser --------------------------------------------------------------------------------------------------------


def test_a_step_has_the_stored_length_and_the_direction_of_today() -> None:
    model = linear_model(hidden=(2,))
    stored, today = (torch.randn(model.spec.size, generator=torch_generator(i)).double() for i in range(2))
    today[model.spec["head.bias"].start :] = 0.0  # no direction: no step
    step = calibrated(model.spec, stored, today)
    for tensor in model.spec:
        part = slice(tensor.start, tensor.stop)
        if today[part].norm() == 0:
            assert step[part].norm() == 0
        else:
            torch.testing.assert_close(step[part].norm(), stored[part].norm())
            torch.testing.assert_close(step[part] / step[part].norm(), today[part] / today[part].norm())


@pytest.mark.parametrize(("every", "stored"), [(1, [0, 1, 2, 3, 4]), (2, [0, 2, 4]), (4, [0, 4])])
def test_without_calibration_the_remaining_changes_are_summed(every: int, stored: list[int]) -> None:
    method = FedEraser(every=every, calibrate=False)
    clients = world(method)
    rounds = [clients.round(("a", "b", "c"), number) for number in range(5)]
    expected = clients.initial.double()
    for number in stored:
        kept = [update for update in rounds[number] if update.client != "c"]
        expected += sum(u.num_examples * u.delta for u in kept) / sum(u.num_examples for u in kept)
    torch.testing.assert_close(clients.unlearn("c").double(), expected)
    assert clients.asked == []
    size = 4 * clients.spec.size * 3 * len(stored)
    assert method.metrics() == {"stored_rounds": len(stored), "stored_bytes": size, "calibrated_rounds": 0}


def test_calibration_turns_what_the_leaver_has_not_touched_the_least() -> None:
    """By hand: the first round as it was, then ||U|| U' / ||U'|| of each remaining client, weighted by samples."""
    method = FedEraser(every=2, ratio=0.5)
    clients = world(method)
    rounds = [clients.round(("a", "b", "c"), number) for number in range(3)]
    resumed = clients.method = bound(moved(method), clients)
    resumed.every, resumed.ratio = 2, 0.5
    erased, asked = clients.unlearn("c"), list(clients.asked)
    assert asked == [("a", "b")]  # once: round 2; round 0 needs no calibration
    start = clients.initial.double() + (12 * rounds[0][0].delta + 8 * rounds[0][1].delta) / 20
    expected = start.clone()
    for update, share in zip(rounds[2], (0.6, 0.4), strict=False):
        args = {"task": 0, "columns": [], "epochs": 1, "place": 2}
        trained = clients.train(update.client, start.float(), "calibrate", args).tensors["model"]
        expected += share * calibrated(clients.spec, update.delta, trained.double() - start.float().double())
    torch.testing.assert_close(erased.double(), expected, rtol=1e-5, atol=1e-6)
    residual = resumed.forget(request("c"))
    assert (residual.outcome, resumed.forget(request("c")).outcome) == ("erased", "not applicable")
    assert "2 stored changes" in residual.why
    assert all("c" not in steps for steps in resumed.state_dict()["rounds"].values())
    # the history is that of the erased run now: serving nobody more ends where it ended
    clients.global_model = erased
    length = resumed.state_dict()["rounds"]["2"]["a"]["change"].double()
    for tensor in clients.spec:
        part = slice(tensor.start, tensor.stop)
        torch.testing.assert_close(length[part].norm(), rounds[2][0].delta[part].norm(), rtol=1e-5, atol=1e-6)


def test_clients_that_do_not_answer_or_hold_nothing_are_left_out() -> None:
    method = FedEraser(every=1)
    clients = world(method)
    first, second = (clients.round(("a", "b", "c"), number) for number in range(2))
    clients.silent = ("b",)
    with_a_alone = clients.unlearn("c")
    a, b = (method.state_dict()["rounds"]["1"][client]["change"] for client in ("a", "b"))
    assert torch.equal(b, second[1].delta.float())  # as it was: it may answer the next time
    assert not torch.equal(a, second[0].delta.float())
    start = clients.initial.double() + (12 * first[0].delta + 8 * first[1].delta) / 20
    torch.testing.assert_close(with_a_alone.double(), start + a.double(), rtol=1e-5, atol=1e-6)
    assert bool(torch.isfinite(with_a_alone).all())
    assert clients.train("a", clients.initial, "calibrate", {"task": 7, "columns": [], "epochs": 1, "place": 0})[0] == 0
    with pytest.raises(TypeError, match="no step 'other'"):
        clients.train("a", clients.initial, "other", {})


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("unlearner", ["federaser", "federaser_uncalibrated"])
def test_a_backdoor_is_gone(unlearner: str, seed: int, tmp_path: Path) -> None:
    found = served(unlearner, seed=seed, folder=tmp_path)
    assert found.backdoor_before > 0.3  # else there is nothing to see
    assert found.clean_before > 0.8
    assert found.backdoor <= 0.10
    if unlearner == "federaser":
        assert found.clean > 0.4
    assert found.measured["unlearner/stored_bytes"] == 4 * 50826 * 10 * found.measured["unlearner/stored_rounds"]


@pytest.mark.slow
def test_with_longer_steps_and_recovery_it_stays_gone(tmp_path: Path) -> None:
    """Momentum makes the backdoor strong; two rounds without the leaver bring accuracy back, not the backdoor."""
    extra = ["client.optimizer.momentum=0.9", "unlearning.recovery_rounds=2"]
    found = served("federaser", *extra, seed=2, folder=tmp_path)
    assert found.backdoor_before > 0.6
    assert found.backdoor <= 0.10
    assert found.clean > 0.8


# -- SIFU -------------------------------------------------------------------------------------------------------------

CONVEX = LocalTraining(epochs=2, batch_size=4, lr=0.1, weight_decay=0.5)


@pytest.mark.parametrize("departing_client", ["a", "b", "c"])
def test_the_bound_holds(departing_client: str) -> None:
    """Against the run that the leaver was never in: strongly convex losses, the same batches."""
    method = SIFU()
    clients = world(method, CONVEX)
    without = world(SIFU(), CONVEX)
    everybody = ("a", "b", "c")
    for number in range(8):
        clients.round(everybody, number)
        without.round([client for client in everybody if client != departing_client], number)
        real = float((clients.global_model.double() - without.global_model.double()).norm())
        psi = method._path.sensitivity([departing_client])
        assert 0 < real <= psi * (1 + 1e-5)
        assert psi < 50 * real  # and says something
    assert not method._broken
    assert method.promise().startswith("certified (1, 0.01)")


# lr x lambda = 0.05; b's 8 samples make the fewest steps of a round: 2 epochs of 2 batches
def test_a_round_contracts_as_often_as_its_laziest_client_steps() -> None:
    method = SIFU()
    clients = world(method, CONVEX)
    clients.round(("a", "b", "c"), 0)
    clients.round(("a", "c"), 1)
    assert [one.factor for one in method._path.rounds] == pytest.approx([0.95**4, 0.95**6])


def test_a_group_is_more_than_its_members() -> None:
    one = Round(0.5, {"a": 0.2, "b": 0.3, "c": 0.5}, {"a": 1.0, "b": 2.0, "c": 1.0}, {})
    assert one.moved(["a"]) == pytest.approx(0.2 / 0.8)
    assert one.moved(["a", "b"]) == pytest.approx((0.2 + 0.6) / 0.5)
    assert one.moved("abc") == float("inf")
    assert one.moved(["d"]) == 0.0
    track = Track()
    track.begin(torch.zeros(1))
    for place in range(1, 4):
        track.add(one, torch.full((1,), float(place)), budget=0.3)
    assert track.sensitivity(["a"], 2) == pytest.approx(0.25 * 1.5)
    assert track.sensitivity(["a"]) == pytest.approx(0.25 * 1.75)
    assert track.rollback_point(["a"], 0.3) == 1
    assert track.rollback_point(["a"], 0.5) == 3
    assert sorted(track.models) == [0, 1, 3]  # 2 is where nobody needs to go back to
    assert equal(Track.of(unpack(*pack(track.state()))).state(), track.state())


def test_budgets() -> None:
    assert budget(1.0, 1e-5, 1.0, "classic") == pytest.approx(1 / 4.8448, rel=1e-3)
    assert budget(1.0, 1e-5, 1.0, "analytic") == pytest.approx(1 / 3.7306, rel=1e-3)
    assert budget(0.5, 0.01, 0.2, "classic") == pytest.approx(2 * budget(0.5, 0.01, 0.1, "classic"))
    assert budget(10.0, 0.01, 1.0, "analytic") < budget(10.0, 0.01, 1.0, "classic")  # which claims too much there


def test_requests_one_after_another() -> None:
    method = SIFU(sigma=0.3, epsilon=1.0, delta=0.1)
    clients = world(method, CONVEX)
    for number in range(6):
        clients.round(("a", "b", "c"), number)
    place = method._path.rollback_point("b", method.budget)
    assert 0 < place < 6  # the case that matters
    kept = method._path.models[place].clone()
    state = unpack(*pack(method.state_dict()))
    method = clients.method = bound(SIFU(sigma=0.3, epsilon=1.0, delta=0.1), clients)
    method.load_state_dict(state)
    first = clients.unlearn("b")
    numbers = method.metrics()
    assert numbers["rounds_rolled_back"] == 6 - place
    assert numbers["sensitivity"] <= numbers["budget"] < numbers["sensitivity_before"]
    start = noisy(kept, clients.spec, 0.3, torch_generator("server", "sifu"))
    assert torch.equal(clients.sent[0], start)
    assert len(method._path.rounds) == 6  # all lost rounds played again ...
    assert clients.asked == [("a", "c")] * (6 - place)  # ... by those who stay
    assert method.forget(request("b")).outcome in ("erased", "retained")
    assert all("b" not in one.distances for one in method._path.rounds)
    assert method._path.sensitivity("b") == 0.0
    before = method._path.sensitivity("c")
    second = clients.unlearn("c")
    assert method.metrics()["sensitivity"] <= method.budget < before
    assert not torch.equal(first, second)
    assert torch.equal(moved(method)._path.models[0], clients.initial)


@pytest.mark.parametrize(
    ("training", "hidden", "settings", "why"),
    [
        (CONVEX, (4,), {}, "hidden layers"),
        (CONVEX, (), {"epsilon": 5.0}, "epsilon > 1"),
    ],
)
def test_it_says_what_does_not_hold(
    training: LocalTraining, hidden: Sequence[int], settings: dict[str, Any], why: str
) -> None:
    clients = world(SIFU(**settings), training, hidden)
    assert clients.method.promise().startswith("approximate: not certified")
    assert why in clients.method.promise()
    assert world(SIFU(epsilon=5.0, mechanism="analytic"), CONVEX).method.promise().startswith("certified (5, 0.01)")
    assert "more than cross-entropy" in bound(SIFU(), clients, plain_loss=False).promise()


def test_a_server_that_does_more_than_average_is_noticed() -> None:
    method = SIFU()
    clients = world(method, CONVEX)
    updates = clients.round(("a", "b"), 0)
    assert not method._broken
    clients.global_model = clients.global_model + 0.1
    view: Any = clients
    method.observe(updates, clients.initial, view)
    assert "more than average" in method.promise()
    assert moved(method)._broken == method._broken


def test_without_a_round_there_is_nothing_to_forget() -> None:
    method = SIFU()
    clients: Any = world(method, CONVEX)
    assert method.unlearn([request("a")], {GLOBAL: clients.initial}, clients) == {}
    assert method.forget(request("a")).outcome == "not applicable"
    assert FedEraser().forget(request("a")).outcome == "not applicable"


def test_which_models_are_convex_and_where_noise_goes() -> None:
    assert is_linear(linear_model(), 3)
    assert not is_linear(linear_model(hidden=(3,)), 3) or linear_model(hidden=(3,)).spec["head.weight"].shape[1] == 3
    assert not is_linear(linear_model(hidden=(5,)), 3)
    model = linear_model()
    touched = noisy(model.vector(), model.spec, 0.5, torch_generator(0)) - model.vector()
    assert bool((touched != 0).all())
    assert float(touched.std()) == pytest.approx(0.5, rel=0.6)


@pytest.mark.slow
def test_sifu_in_a_run_removes_the_backdoor(tmp_path: Path) -> None:
    found = served("sifu", seed=2, folder=tmp_path)
    assert found.backdoor_before > 0.3
    assert found.backdoor <= 0.15
    assert found.measured["unlearner/sensitivity"] <= found.measured["unlearner/budget"]
