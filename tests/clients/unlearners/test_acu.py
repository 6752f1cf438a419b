"""ACU: the head without the forget set is the head of a run that never held it, to the last digits of float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from clients.learners.ranpac import GRAM, RanPAC, gram_sums
from clients.unlearners.acu import ACU, restore_columns, same_below_heads
from fedcl.config.value_rules import ConfigError
from fedcl.contracts.requests import ForgetRequest
from fedcl.contracts.statistics import Statistics
from fedcl.contracts.unlearner import Samples
from fedcl.contracts.view import Query, Response
from fedcl.models.flat import FlatModel
from fedcl.models.networks import MLP, build_model
from fedcl.runs.setup import Setup
from fedcl.scenario.task import Task
from tests.clients.serving import NOTHING, Serving
from tests.toy import configure, run_toy, write_files

EXACT = 1e-8


def ridge(sums: dict[str, Tensor]) -> Tensor:
    """Return the head (C, F) of RanPAC's default, in float64: the same formula, without rounding to a model."""
    gram = sums["gram"]
    return torch.linalg.solve(gram + 1e-3 * gram.diagonal().mean() * torch.eye(len(gram)).double(), sums["cross"]).T


def apart(one: Tensor, other: Tensor) -> float:
    """Return the distance relative to the length."""
    return float((one - other).norm() / other.norm())


def linear(features: int, columns: int) -> FlatModel:
    return FlatModel(MLP(input_shape=(features,), heads=(columns,), hidden=()))


def test_fifty_requests_leave_the_sums_of_what_stays() -> None:
    """128 features, 50 requests of 40 samples out of 3000: against a solution from scratch after each."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(128, 128, generator=generator) * torch.logspace(0, -3, 128)  # a spectrum over six decades
    x = (torch.randn(3000, 128, generator=generator) @ mixing).float()
    y = torch.randint(0, 10, (3000,), generator=generator)
    model, stays = linear(128, 10), torch.ones(3000, dtype=torch.bool)
    statistics = Statistics([RanPAC()], model)
    task = Task(0, tuple(range(10)), tuple(range(10)))
    first = gram_sums([(x.double(), y)], 10)
    statistics.consume(Query(GRAM, {}, {}), [Response("0", 3000, first)], {"0": task})
    acu, order = ACU(), torch.randperm(3000, generator=generator)
    worst = 0.0
    for k, rows in enumerate(order[:2000].split(40)):
        gone = torch.zeros(3000, dtype=torch.bool)
        gone[rows] = True
        stays &= ~gone
        serving = Serving(
            acu, model, {"0": (Samples(x[gone], y[gone]), Samples(x[stays], y[stays]))}, statistics=statistics
        )
        request = ForgetRequest(f"r{k}", "sample", samples=tuple(rows.tolist()))
        before = statistics.sums(GRAM)
        acu.unlearn([request], {"*": serving.initial}, serving)
        assert acu.metrics() == {"rebuilt": 0.0, "samples": 40.0}
        assert statistics.forget(request).outcome == "recomputed"
        assert apart(ridge(statistics.sums(GRAM)), ridge(before)) > 1e-4  # the samples did matter
        worst = max(worst, apart(ridge(statistics.sums(GRAM)), ridge(gram_sums([(x[stays].double(), y[stays])], 10))))
    assert worst < EXACT


# -- in whole runs ---------------------------------------------------------------------------------------------------

REQUESTS = {
    "client": ("{id: a, scope: client, clients: ['3'], at: {round: %d}}", "exclude.clients=['3']"),
    "class": ("{id: a, scope: class, classes: [1], at: {round: %d}}", "exclude.classes=[1]"),
    "sample": ("{id: a, scope: sample, samples: [0, 1, 2, 3, 6, 7], at: {round: %d}}", "exclude.samples=[0,1,2,3,6,7]"),
}
HEADS = {
    "random": ["model.head=random", "model.head_width=32", "learner.ranpac.train=none"],
    "frozen": ["model.freeze=hidden", "learner.ranpac.train=first_task"],
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return write_files(tmp_path_factory.mktemp("toy"))


def run(files: dict[str, str], *extra: str, num_tasks: int = 2) -> list[dict[str, Any]]:
    """Return the server's state at the beginning and after each round."""
    options = ["unlearning.reference=false", "client.epochs=1", *extra]
    choices = {"learner": "ranpac", "unlearner": "acu"}
    diary = run_toy(configure(choices, files, torch.device("cpu"), *options, num_tasks=num_tasks))
    assert not diary.faults
    return [state["server"] for state in diary.saved]


@pytest.mark.parametrize(
    ("scope", "heads"),
    [
        ("client", "random"),
        ("class", "random"),
        ("sample", "frozen"),
        pytest.param("client", "frozen", marks=pytest.mark.slow),
        pytest.param("class", "frozen", marks=pytest.mark.slow),
        pytest.param("sample", "random", marks=pytest.mark.slow),
    ],
)
def test_the_head_is_that_of_a_run_without_the_forget_set(scope: str, heads: str, files: dict[str, str]) -> None:
    """Asked in the middle of the second task, whose samples are in no sums yet."""
    request, excluded = REQUESTS[scope]
    served = run(files, f"unlearning.requests=[{request % 3}]", *HEADS[heads])
    never = run(files, excluded, *HEADS[heads])
    before, began = (saved[3]["statistics"]["sums"][GRAM] for saved in (served, never))
    assert apart(before["gram"], began["gram"]) > 1e-2  # it did matter
    # A client's batches are the same in both runs. Within one that keeps some samples batches differ, and with them the
    # last bit of float32 features: no head is more exact than its features, times the condition of the ridge problem.
    bound = EXACT if scope == "client" else 1e-5
    one, other = (saved[4]["statistics"]["sums"][GRAM] for saved in (served, never))
    assert torch.equal(one["counts"], other["counts"])
    known = other["counts"] > 0
    assert apart(one["gram"], other["gram"]) < min(bound, 1e-6)
    assert apart(ridge(one)[known], ridge(other)[known]) < bound
    features = len(one["gram"])
    heads_of = [saved[4]["models"]["*"][-6 * (features + 1) : -6].reshape(6, features) for saved in (served, never)]
    torch.testing.assert_close(*(head[known] for head in heads_of), rtol=1e-4, atol=1e-5)  # rounded to float32


@pytest.mark.parametrize("way", ["subtract", "rebuild"])
def test_a_request_that_waits_is_taken_out_of_what_held_it_alone(way: str, files: dict[str, str]) -> None:
    """Admitted before the second task, served before the third: the second task's sums never had the samples."""
    request, excluded = REQUESTS["sample"]
    options = ["rounds_per_task=1", *HEADS["random"]]
    never = run(files, excluded, *options, num_tasks=3)
    window = ["unlearning.window=1", f"unlearner.sums={way}"]
    served = run(files, f"unlearning.requests=[{request % 1}]", *window, *options, num_tasks=3)
    assert served[1]["statistics"]["sums"][GRAM]["counts"].sum() > never[1]["statistics"]["sums"][GRAM]["counts"].sum()
    one, other = (saved[3]["statistics"]["sums"][GRAM] for saved in (served, never))
    assert torch.equal(one["counts"], other["counts"])
    assert apart(one["gram"], other["gram"]) < 1e-6


def test_a_class_that_is_gone_has_the_columns_of_the_beginning(files: dict[str, str]) -> None:
    request, _ = REQUESTS["class"]
    saved = run(files, f"unlearning.requests=[{request % 3}]", *HEADS["random"])
    column = slice(32, 64)  # of class 1: the second row of 32 features
    head = slice(saved[0]["models"]["*"].numel() - 6 * 33, None)
    began, knew, ended = (saved[at]["models"]["*"][head][column] for at in (0, 3, 4))
    assert torch.equal(ended, began)
    assert not torch.equal(knew, began)


def test_where_the_network_was_trained_the_head_is_rebuilt(files: dict[str, str]) -> None:
    request, _ = REQUESTS["client"]
    options = ["unlearning.reference=false", "client.epochs=1", f"unlearning.requests=[{request % 3}]"]
    choices = {"learner": "ranpac", "unlearner": "acu"}
    diary = run_toy(configure(choices, files, torch.device("cpu"), *options, num_tasks=2))
    rows = {row["name"]: row["value"] for row in diary.rows if row["phase"] == "unlearning"}
    assert (diary.faults, rows["unlearner/rebuilt"]) == ([], 1.0)
    assert rows["unlearner/samples"] > 0


# -- in pieces -------------------------------------------------------------------------------------------------------


def trained(shift: float = 0.0) -> tuple[Serving, Statistics]:
    """Return two clients whose sums are in, one of which has samples to forget, and a body moved by ``shift``."""
    model = FlatModel(build_model(lambda: MLP(input_shape=(4,), heads=(3,), hidden=(8,)), seed=0))
    generator = torch.Generator().manual_seed(0)
    samples = [Samples(torch.randn(9, 4, generator=generator), torch.arange(9) % 3) for _ in range(2)]
    statistics = Statistics([RanPAC()], model.copy())
    first = samples[0]
    held = {"0": (first.at(torch.arange(4)), first.at(torch.arange(4, 9))), "1": (NOTHING, samples[1])}
    serving = Serving(ACU(), model, held, statistics=statistics)
    task = Task(0, (0, 1, 2), (0, 1, 2))
    responses = [
        Response(str(k), 9, gram_sums([(model(s.x).features.detach().double(), s.y)], 3)) for k, s in enumerate(samples)
    ]
    statistics.consume(Query(GRAM, {}, {}), responses, {"0": task, "1": task})
    model.spec.view(model.flat, "hidden.0.weight").add_(shift)
    return serving, statistics


@pytest.mark.parametrize("way", ["subtract", "rebuild"])
def test_both_ways_agree(way: Any) -> None:
    serving, statistics = trained()
    serving.unlearner = ACU(sums=way)
    serving.serve()
    kept = Samples.join([retain for _, retain in serving.held.values()])
    serving.model.load(serving.initial)
    expected = gram_sums([(serving.model(kept.x).features.detach().double(), kept.y)], 3)
    assert apart(ridge(statistics.sums(GRAM)), ridge(expected)) < EXACT
    assert [client for _, client in serving.asked] == (["0"] if way == "subtract" else ["0", "1"])
    assert serving.unlearner.promise().startswith("exact for the head")


def test_features_that_moved_are_not_subtracted() -> None:
    serving, statistics = trained()
    moved = serving.initial.clone()
    serving.spec.view(moved, "hidden.0.weight").add_(0.5)
    serving.model_of = lambda client: moved  # type: ignore[method-assign]
    edited = serving.serve(moved)
    kept = Samples.join([retain for _, retain in serving.held.values()])
    serving.model.load(moved)
    expected = gram_sums([(serving.model(kept.x).features.detach().double(), kept.y)], 3)
    assert apart(ridge(statistics.sums(GRAM)), ridge(expected)) < EXACT
    torch.testing.assert_close(serving.spec.view(edited, "head.weight"), ridge(expected).float(), rtol=1e-4, atol=1e-5)
    assert serving.unlearner.promise().startswith("approximate: the head is solved from what stays")
    assert serving.unlearner.metrics()["rebuilt"] == 1.0


def test_a_leaver_that_cannot_be_asked_is_left_out_by_rebuilding() -> None:
    serving, statistics = trained()
    serving.held = {"0": (NOTHING, serving.held["0"][1]), "1": serving.held["1"]}  # nobody to ask for the forget set
    serving.leaving = ("0",)
    serving.serve()
    assert [client for _, client in serving.asked] == ["1"]
    assert list(statistics.consumed(GRAM)) == ["1"]
    assert float(statistics.sums(GRAM)["counts"].sum()) == 9.0


def test_before_any_head_is_solved_nothing_is_promised() -> None:
    serving, _ = trained()
    serving.statistics = Statistics([RanPAC()], serving.model.copy())
    assert torch.equal(serving.serve(), serving.initial)
    assert serving.unlearner.promise().startswith("none: no head has been solved yet")


def test_other_learners_are_refused(files: dict[str, str]) -> None:
    request, _ = REQUESTS["client"]
    cfg = configure(
        {"unlearner": "acu", "learner": "ewc"}, files, torch.device("cpu"), f"unlearning.requests=[{request % 3}]"
    )
    with pytest.raises(ConfigError, match=r"takes apart the sums of gram, .*learner=ewc does not"):
        Setup.of(cfg)
    serving, _ = trained()
    serving.statistics = Statistics()
    with pytest.raises(ValueError, match="takes apart the sums of learner=ranpac"):
        serving.serve()


def test_sums_survive_with_whose_they_are() -> None:
    serving, statistics = trained()
    other = Statistics([RanPAC()], serving.model.copy())
    other.load_state_dict(statistics.state_dict())
    assert other.consumed(GRAM) == statistics.consumed(GRAM)
    assert torch.equal(other.sums(GRAM)["gram"], statistics.sums(GRAM)["gram"])


def test_sums_that_nobody_took_apart_are_reset() -> None:
    _, statistics = trained()
    residual = statistics.forget(ForgetRequest("b", "class", classes=(0,)))
    assert (residual.outcome, statistics.sums(GRAM), statistics.consumed(GRAM)) == ("reset", {}, {})


def test_columns_of_several_heads_are_restored() -> None:
    model = FlatModel(MLP(input_shape=(2,), heads=(1, 2), hidden=(3,)))
    before, vector = model.vector(), model.vector() + 1
    assert not same_below_heads(model.spec, before, vector)
    restore_columns(model.spec, vector, before, torch.tensor([False, False, True]))
    changed = vector != before
    assert changed[model.spec["heads.0.weight"].start : model.spec["heads.0.bias"].stop].all()
    assert model.spec.view(changed, "heads.1.weight").tolist() == [[True] * 3, [False] * 3]
    assert model.spec.view(changed, "heads.1.bias").tolist() == [True, False]
    vector = before.clone()
    model.spec.view(vector, "heads.1.weight").add_(1.0)
    assert same_below_heads(model.spec, before, vector)
