"""Learners whose head is solved from sums: worked by hand, and the same however samples are dealt out."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from clients.learners.closed_form import write_heads
from clients.learners.nmc import NearestClassMean
from clients.learners.protocl import ProtoCL, log_joint
from clients.learners.ranpac import RanPAC
from fedcl.contracts.learner import Batch, Context, TaskData
from fedcl.models.flat import FlatModel
from fedcl.models.networks import MLP, Output
from fedcl.scenario.task import Task
from tests.sampling import sampled
from tests.toy import configure, run_toy, write_files


def linear(columns: int = 2, head: str = "linear") -> FlatModel:
    """Return a model whose features are its inputs, with a head of zeros."""
    model = FlatModel(MLP(input_shape=(2,), heads=(columns,), hidden=(), head=head))
    model.flat.zero_()
    return model


def context(model: FlatModel, x: Tensor, y: Tensor, *, seen: int = 1) -> Context:
    columns = dict.fromkeys(range(seen), (0, 1))
    return Context(
        model=model, task=Task(seen - 1, (0, 1), (0, 1)), data=TaskData(x, y), received=model.vector(), epochs=1,
        batch_size=2, lr=0.1, seed=0, client="0", local_round=0, is_new_task=True, task_columns=columns,
        num_columns=model.spec.size // 3,
    )  # fmt: skip


X = torch.tensor([[3.0, 0.0], [1.0, 0.0], [0.0, 2.0]])
Y = torch.tensor([0, 0, 1])


@pytest.mark.parametrize(
    ("distance", "weight", "bias"),
    [("cosine", [[1.0, 0.0], [0.0, 1.0]], [0.0, 0.0]), ("euclidean", [[2.0, 0.0], [0.0, 2.0]], [-2.0, -2.0])],
)
def test_means_by_hand(distance: Any, weight: list[list[float]], bias: list[float]) -> None:
    model, nmc = linear(), NearestClassMean(distance=distance)
    sums = nmc.respond(context(model, X, Y), "class_sums", {})
    assert sums["counts"].tolist() == [2.0, 1.0]
    nmc.solve(model, sums)
    assert model.spec.view(model.flat, "head.weight").tolist() == weight
    assert model.spec.view(model.flat, "head.bias").tolist() == bias


# lengths 5 and 1: of unit features the mean is (0.8, 0.4), as they came (2, 2)
@pytest.mark.parametrize(("distance", "sums"), [("cosine", [1.6, 0.8]), ("euclidean", [4.0, 4.0])])
def test_cosine_means_are_of_features_of_length_one(distance: Any, sums: list[float]) -> None:
    model, nmc = linear(), NearestClassMean(distance=distance)
    response = nmc.respond(
        context(model, torch.tensor([[3.0, 4.0], [1.0, 0.0]]), torch.tensor([0, 0])), "class_sums", {}
    )
    assert response["features"][0].tolist() == pytest.approx(sums)
    nmc.solve(model, response)
    row = model.spec.view(model.flat, "head.weight")[0]
    expected = [2 / math.sqrt(5), 1 / math.sqrt(5)] if distance == "cosine" else [2.0, 2.0]
    assert row.tolist() == pytest.approx(expected)


def test_the_rule_of_janson_by_hand() -> None:
    """Class 0 points in two directions, so its mean (1/2, 1/2) is short; class 1 lies between, mean (0.6, 0.8).

    A sample along (1, 0): |z - mu|^2 is 1/2 for class 0 and 0.16 + 0.64 = 0.8 for class 1, so it is class 0, whatever
    its length. By the cosine, 0.707 against 0.6, it is class 0 too; along (3, 4), 0.01 + 0.09 = 0.1 against 0, both say
    class 1; along (0.8, 0.6) the squared distances are 0.1 and 0.08, and the cosines 0.990 and 0.96: there they differ.
    """
    x = torch.tensor([[3.0, 0.0], [0.0, 2.0], [6.0, 8.0]])
    model = linear(head="unit")
    nmc = NearestClassMean(distance="unit_euclidean")
    nmc.check(model)
    sums = nmc.respond(context(model, x, torch.tensor([0, 0, 1])), "class_sums", {})
    torch.testing.assert_close(sums["features"], torch.tensor([[1.0, 1.0], [0.6, 0.8]], dtype=torch.float64))
    nmc.solve(model, sums)
    torch.testing.assert_close(
        model.spec.view(model.flat, "head.weight"), torch.tensor([[0.5, 0.5], [0.6, 0.8]]), rtol=0, atol=1e-7
    )
    torch.testing.assert_close(model.spec.view(model.flat, "head.bias"), torch.tensor([-0.25, -0.5]))
    z = torch.tensor([[9.0, 0.0], [0.03, 0.04], [8.0, 6.0]])
    squared = torch.tensor([[0.5, 0.8], [0.1, 0.0], [0.1, 0.08]])
    torch.testing.assert_close(0.5 - model(z).logits.detach(), squared / 2, rtol=0, atol=1e-6)
    assert model(z).logits.argmax(1).tolist() == [0, 1, 1]
    cosine, plain = NearestClassMean(), linear()
    cosine.solve(plain, cosine.respond(context(plain, x, torch.tensor([0, 0, 1])), "class_sums", {}))
    assert plain(z).logits.argmax(1).tolist() == [0, 1, 0]


def test_the_rule_of_janson_needs_a_head_on_unit_features() -> None:
    with pytest.raises(ValueError, match=r"learner\.nmc\.distance=unit_euclidean: .*set model\.head=unit"):
        NearestClassMean(distance="unit_euclidean").check(linear())


def test_a_class_without_samples_keeps_its_row() -> None:
    model = linear(3)
    model.spec.view(model.flat, "head.bias").fill_(7.0)
    NearestClassMean().solve(model, NearestClassMean().respond(context(model, X, Y), "class_sums", {}))
    assert model.spec.view(model.flat, "head.bias").tolist() == [0.0, 0.0, 7.0]


def test_several_heads_take_their_own_rows() -> None:
    model = FlatModel(MLP(input_shape=(2,), heads=(1, 2), hidden=()))
    weight = torch.arange(6.0).reshape(3, 2)
    write_heads(model, weight, torch.tensor([7.0, 8.0, 9.0]), torch.ones(3, dtype=torch.bool))
    assert model.spec.view(model.flat, "heads.0.weight").tolist() == [[0.0, 1.0]]
    assert model.spec.view(model.flat, "heads.1.weight").tolist() == [[2.0, 3.0], [4.0, 5.0]]
    assert model.spec.view(model.flat, "heads.1.bias").tolist() == [8.0, 9.0]


def test_ridge_by_hand() -> None:
    model, ranpac = linear(), RanPAC(ridge=0.5)
    sums = ranpac.respond(context(model, X, Y), "gram", {})
    assert sums["gram"].tolist() == [[10.0, 0.0], [0.0, 4.0]]
    assert sums["cross"].tolist() == [[4.0, 0.0], [0.0, 2.0]]
    ranpac.solve(model, sums)  # lambda = 0.5 mean(10, 4) = 3.5
    torch.testing.assert_close(
        model.spec.view(model.flat, "head.weight"), torch.tensor([[4 / 13.5, 0.0], [0.0, 2 / 7.5]])
    )


def test_posterior_by_hand() -> None:
    # one class, one feature: samples 3 and 1, noise 2, prior 1: precision 1 + 2/2 = 2, mean (4/2)/2 = 1, variance 2.5
    found = log_joint(torch.tensor([[2.0]]), torch.tensor([[4.0]]), torch.tensor([2.0]), noise=2.0, prior=1.0)
    assert float(found) == pytest.approx(-0.5 * (1.0 / 2.5 + math.log(2.5)) + math.log(3.0))


def test_the_linear_head_is_the_posterior_where_counts_are_equal() -> None:
    model, protocl = linear(), ProtoCL(noise=0.5, prior=2.0)
    x, y = torch.tensor([[1.0, 0.5], [0.8, 0.1], [-0.5, 1.0], [0.0, 1.2]]), torch.tensor([0, 0, 1, 1])
    sums = protocl.respond(context(model, x, y), "prototypes", {})
    protocl.solve(model, sums)
    z = torch.tensor([[0.3, 0.4], [-1.0, 2.0]])
    exact = log_joint(z.double(), sums["features"], sums["counts"], noise=0.5, prior=2.0)
    torch.testing.assert_close(
        torch.log_softmax(model(z).logits, 1).detach(), torch.log_softmax(exact, 1).float(), rtol=1e-5, atol=1e-6
    )


# noise and prior 1: precisions 4 and 2, means (1, 0) and (0, 1), variances 1 + (1/4 + 1/2) / 2
def test_the_linear_head_knows_which_class_has_more_samples() -> None:
    model, protocl = linear(), ProtoCL(noise=1.0, prior=1.0)
    x = torch.tensor([[1.0, 0.0], [1.0, 0.0], [2.0, 0.0], [0.0, 2.0]])
    protocl.solve(model, protocl.respond(context(model, x, torch.tensor([0, 0, 0, 1])), "prototypes", {}))
    variance = 1.375
    torch.testing.assert_close(model.spec.view(model.flat, "head.weight"), torch.eye(2) / variance)
    biases = [-0.5 / variance + math.log(4 / 4), -0.5 / variance + math.log(2 / 4)]
    assert model.spec.view(model.flat, "head.bias").tolist() == pytest.approx(biases)


def shared(sums: list[list[float]], counts: list[float]) -> dict[str, Tensor]:
    return {"prototypes/features": torch.tensor(sums), "prototypes/counts": torch.tensor(counts)}


def test_classes_of_the_present_task_have_the_clients_own_sums_and_others_everybodys() -> None:
    ctx, protocl = context(linear(4), X, Y), ProtoCL(noise=2.0, prior=3.0)
    ctx.payload = shared([[90.0, 90.0], [90.0, 90.0], [5.0, 7.0], [0.0, 0.0]], [9.0, 9.0, 2.0, 0.0])
    protocl.before_round(ctx)
    z = torch.tensor([[1.0, 2.0], [0.5, -1.0]])
    sums = torch.tensor([[4.0, 0.0], [0.0, 2.0], [5.0, 7.0], [0.0, 0.0]])
    joint = log_joint(z, sums, torch.tensor([2.0, 1.0, 2.0, 0.0]), noise=2.0, prior=3.0)
    target = torch.tensor([0, 1])

    # the last class has no samples anywhere; a mask of the batch hides the third as well
    for mask, columns in ((None, [0, 1, 2]), (torch.tensor([True, True, False, True]), [0, 1])):
        expected = torch.nn.functional.cross_entropy(joint[:, columns], target)
        found = protocl.objective(ctx, Batch(z, target, mask), Output(torch.zeros(2, 4), z))
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(("train", "epochs"), [("none", [0, 0]), ("first_task", [3, 0]), ("all", [3, 3])])
def test_the_network_is_trained_as_long_as_asked(train: Any, epochs: list[int]) -> None:
    plugin, order = NearestClassMean(train=train), torch.arange(3)
    assert [len(plugin.indices(context(linear(), X, Y, seen=seen), order)) for seen in (1, 2)] == epochs


JANSON = ["learner.nmc.distance=unit_euclidean", "model.head=unit"]
LEARNERS = [("nmc", []), ("nmc", JANSON), ("ranpac", []), ("protocl", [])]


@pytest.mark.parametrize(("learner", "partition"), sampled(LEARNERS, ["dirichlet", "shards", "iid"], every=3))
def test_any_clients_are_as_good_as_one(
    learner: tuple[str, list[str]], partition: str, tmp_path: Path, device: torch.device
) -> None:
    """The same samples at one client, or at four of which two a round are chosen: the same head after every task."""
    files = write_files(tmp_path)
    models = []
    for split in (["num_clients=1"], ["num_clients=4", "clients_per_round=2"]):
        name, options = learner
        choices = {"learner": name, "data/partition": partition, "scenario": "class_incremental"}
        diary = run_toy(configure(choices, files, device, f"learner.{name}.train=none", *options, *split))
        assert not diary.faults
        models.append([state["server"]["models"]["*"] for state in diary.saved])
    for together, apart in zip(*models, strict=True):
        torch.testing.assert_close(apart, together, rtol=1e-5, atol=1e-6)  # one sum in another order, rounded once
    assert not torch.equal(models[0][0], models[0][-1])


@pytest.mark.parametrize("gram", [torch.zeros(3, 3), torch.full((3, 3), -1e18), torch.eye(3) - 2])
def test_a_gram_matrix_that_is_none_stops_no_run(gram: Tensor) -> None:
    model = FlatModel(MLP(input_shape=(3,), heads=(2,), hidden=()))
    counts = torch.tensor([2.0, 1.0], dtype=torch.float64)
    cross = torch.ones(3, 2, dtype=torch.float64)
    RanPAC().solve(model, {"gram": gram.double(), "cross": cross, "counts": counts})
    assert bool(torch.isfinite(model.flat).all())
