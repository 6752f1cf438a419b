"""Reteaching: the teacher's closed form, the directions it spares, and that the leaver's labels do not matter."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from clients.unlearners.reteach import Reteach
from clients.unlearners.sparing import (
    Spared,
    add_gram,
    half,
    input_sums,
    layers_of,
    random_features,
    sparing_matrices,
    whole,
)
from clients.unlearners.steps import gradients
from fedcl.base.randomness import torch_generator
from fedcl.contracts.requests import ForgetRequest
from fedcl.contracts.unlearner import Samples
from fedcl.contracts.view import Response
from fedcl.models.flat import FlatModel
from fedcl.models.networks import MLP, LeNet, Output, build_model
from tests.clients.serving import NOTHING, Serving

CLASSES, INPUTS = 3, 4


def mlp() -> FlatModel:
    return FlatModel(build_model(lambda: MLP(input_shape=(INPUTS,), heads=(CLASSES,), hidden=(5,)), seed=0))


class Layered(nn.Module):
    """All kinds of layers, with activations that work in place."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 3, 3, stride=2, padding=1), nn.ReLU(inplace=True), nn.BatchNorm2d(3), nn.Flatten(),
            nn.Linear(12, 5, bias=False), nn.ReLU(inplace=True),
        )  # fmt: skip
        self.head = nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Output:
        features = self.body(x)
        return Output(self.head(features), features)


def drawn(purpose: str, count: int = 12) -> Samples:
    generator = torch_generator(purpose)
    x = torch.randn(count, INPUTS, generator=generator)
    return Samples(x, torch.randint(CLASSES, (count,), generator=generator))


def serving(unlearner: Reteach, departing_client: Samples) -> Serving:
    held = {"0": (NOTHING, drawn("a")), "1": (NOTHING, drawn("b", 7)), "2": (departing_client, NOTHING)}
    return Serving(unlearner, mlp(), held, leaving=("2",))


def test_half_a_symmetric_matrix_is_all_of_it() -> None:
    matrix = torch.tensor([[1.0, 2.0, 3.0], [2.0, 4.0, 5.0], [3.0, 5.0, 6.0]])
    assert half(matrix).tolist() == [1, 2, 3, 4, 5, 6]
    assert torch.equal(whole(half(matrix)), matrix)


def test_inputs_are_summed_with_a_one_for_the_bias() -> None:
    model, samples = mlp(), drawn("a")
    sums = {name: whole(triangle) for name, triangle in input_sums(model, samples).items()}
    read = torch.cat([samples.x, torch.ones(12, 1)], 1)
    assert list(sums) == list(layers_of(model.module)) == ["hidden.0", "head"]
    torch.testing.assert_close(sums["hidden.0"], read.T @ read)
    assert sums["head"].shape == (6, 6)
    assert float(sums["head"][-1, -1]) == 12


def test_a_convolution_is_summed_over_its_patches() -> None:
    model = FlatModel(build_model(lambda: LeNet(input_shape=(1, 16, 16), heads=(2,)), seed=0))
    sums = input_sums(model, Samples(torch.rand(2, 1, 16, 16, generator=torch_generator("x")), torch.zeros(2).long()))
    conv1 = whole(sums["conv1"])
    assert conv1.shape == (26, 26)
    assert float(conv1[-1, -1]) == 2 * 12 * 12  # two images, 12 x 12 places each


@pytest.mark.parametrize("width", [1, 95, 96, 97, 300])
def test_a_gram_matrix_is_summed_strip_by_strip(width: int) -> None:
    total = torch.zeros(width, width)
    parts = torch.randn(40, width, generator=torch_generator("rows")).split(25)
    for rows in parts:
        add_gram(total, rows)
    rows = torch.cat(parts).double()
    torch.testing.assert_close(whole(half(total)).double(), rows.T @ rows, rtol=1e-5, atol=1e-5)


def test_directions_in_use_are_spared_and_others_are_not() -> None:
    # of two inputs, those who stay use the first alone: energies 2 and 0, mean 1
    responses = [Response("0", 1, {"gram/head": half(torch.diag(torch.tensor([2.0, 0.0])))})]
    matrix = sparing_matrices(responses, 0.1)["head"]
    raw = torch.tensor([1 / 2.1, 1 / 0.1])
    torch.testing.assert_close(matrix, torch.diag(raw / raw.mean()))


@pytest.mark.parametrize("count", [2, 60])  # fewer and more rows than any layer has outputs: both orders of the product
def test_spared_gradients_are_those_of_autograd_times_the_matrix(count: int) -> None:
    model = FlatModel(build_model(Layered, seed=0))
    model.eval()
    generator = torch_generator("x")
    x = torch.randn(count, 1, 4, 4, generator=generator)
    y = torch.randint(4, (count,), generator=generator)
    layers = layers_of(model.module)
    widths = {name: layer.weight[0].numel() + (layer.bias is not None) for name, layer in layers.items()}
    matrices = {name: torch.randn(width, width, generator=generator) for name, width in widths.items()}

    def loss() -> Tensor:
        return nn.functional.cross_entropy(model(x).logits, y)

    plain = gradients(model, loss())
    expected = [torch.zeros_like(grad) for grad in plain]  # of normalisation: it stays as it is
    places = {id(parameter): place for place, parameter in enumerate(model.trainable)}
    for name, layer in layers.items():
        weight = places[id(layer.weight)]
        joint = plain[weight].flatten(1)
        if layer.bias is not None:
            joint = torch.cat([joint, plain[places[id(layer.bias)]][:, None]], 1)
        turned = joint @ matrices[name]
        inputs = layer.weight[0].numel()
        expected[weight] = turned[:, :inputs].reshape(layer.weight.shape)
        if layer.bias is not None:
            expected[places[id(layer.bias)]] = turned[:, -1]
    assert sum(bool(grad.any()) for grad in plain) == 7
    torch.testing.assert_close(Spared(model, matrices).gradients(loss), expected, rtol=1e-4, atol=1e-5)


def test_the_teacher_is_ridge_regression_on_everybodys_features() -> None:
    unlearner = Reteach(features=8)
    view = serving(unlearner, drawn("leaver"))
    solved = unlearner._solve(
        view.ask("teacher", dict.fromkeys(view.clients, view.initial), unlearner._teaching, seed=5)
    )
    pooled = Samples.join([drawn("a"), drawn("b", 7)])
    phi = random_features(pooled.x, 8, 5).double()
    gram, cross = phi.T @ phi, phi.T @ torch.nn.functional.one_hot(pooled.y, CLASSES).double()
    penalty = 0.01 * gram.trace() / 9 * torch.eye(9, dtype=torch.float64)
    assert solved is not None
    torch.testing.assert_close(solved.double(), torch.linalg.solve(gram + penalty, cross), rtol=1e-3, atol=1e-4)


def served(departing_client: Samples, **settings: float) -> Tensor:
    view = serving(Reteach(features=16, **settings), departing_client)  # type: ignore[arg-type]
    asked = ForgetRequest("r", "client", clients=("2",))
    return view.unlearner.unlearn([asked], {"*": view.initial}, view)["*"]


def test_the_leavers_labels_do_not_matter() -> None:
    departing_client = drawn("leaver")
    other = replace(departing_client, y=(departing_client.y + 1) % CLASSES)
    edited = served(departing_client)
    assert torch.equal(edited, served(other))
    assert not torch.equal(edited, mlp().vector())


def test_no_epochs_change_nothing() -> None:
    assert torch.equal(served(drawn("leaver"), epochs=0), mlp().vector())


@pytest.mark.parametrize(("bound", "steps"), [(3, 3.0), (0, 0.0), (None, 30.0)])
def test_steps_end_at_their_bound(bound: int | None, steps: float) -> None:
    view = serving(Reteach(features=16, epochs=10, batch_size=4, max_steps=bound), drawn("leaver"))
    asked = ForgetRequest("r", "client", clients=("2",))
    edited = view.unlearner.unlearn([asked], {"*": view.initial}, view)["*"]
    assert view.unlearner.metrics() == {"steps": steps}  # of 10 x 3 batches of 12 samples
    assert torch.equal(edited, view.initial) == (steps == 0)


def test_those_who_stay_notice_less_where_their_directions_are_spared() -> None:
    kept, model = Samples.join([drawn("a"), drawn("b", 7)]), mlp()

    def moved(vector: Tensor) -> float:
        before, after = mlp(), model
        after.load(vector)
        with torch.no_grad():
            return float((after(kept.x).logits - before(kept.x).logits).norm())

    strict, loose = (served(drawn("leaver", 40), epsilon=epsilon, lr=0.003) for epsilon in (1e-4, 1e4))
    assert moved(strict) < 0.5 * moved(loose)


@pytest.mark.parametrize(("bound", "counts"), [(5, [5, 5]), (10, [10, 7]), (None, [12, 7])])
def test_no_more_samples_of_a_client_are_summed_than_asked_for(bound: int | None, counts: list[int]) -> None:
    unlearner = Reteach(features=8, max_samples=bound)
    view = serving(unlearner, drawn("leaver"))
    forms = {"teacher": unlearner._teaching, "inputs": unlearner._inputs}
    for step, form in ({"both": {**forms["teacher"], **forms["inputs"]}} | forms).items():
        responses = view.ask(step, dict.fromkeys(view.clients, view.initial), form, seed=5)
        assert [response.num_examples for response in responses] == counts
        for response, count in zip(responses, counts, strict=True):
            constants = [whole(t)[-1, -1] for name, t in response.tensors.items() if name != "cross"]
            assert [float(constant) for constant in constants] == [count] * len(constants)  # the sum of its ones
