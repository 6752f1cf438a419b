from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, cast

import pandas as pd
import pytest
import torch
from torch import Tensor, nn

from clients.strategies.fot import Sketch, SubspaceResponse, layer_rows
from fedcl.base.linalg import project_out
from fedcl.base.randomness import torch_generator
from fedcl.base.tree import equal, pack, unpack
from fedcl.contracts.learner import Context, LocalTraining, TaskData
from fedcl.contracts.requests import ForgetRequest
from fedcl.contracts.strategy import GLOBAL, Event, LocalWork, Update
from fedcl.contracts.view import Query, Response
from fedcl.messages import Reply
from fedcl.messages.arrays import record_tensors, tensors_record
from fedcl.models.flat import FlatModel, Spec
from fedcl.models.networks import MLP, Dropout, Network, Output, build_model
from fedcl.scenario.task import Task
from fedcl.server.validation import Expected, rejection
from strategies.projection.fot import FOT


class SmallConv(Network):
    """Two convolutions with stride, padding and dilation, then a hidden layer."""

    def __init__(self, heads: Sequence[int] = (3,)) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 3, 3, stride=2, padding=1)
        self.second = nn.Conv2d(3, 4, (2, 3), dilation=(2, 1), padding=(1, 0), bias=False)
        self.hidden = nn.Linear(4 * 4 * 2, 6)
        self.drop = Dropout(0.5)
        self.attach_heads(6, heads)

    def inputs(self, x: Tensor) -> dict[str, Tensor]:
        first = torch.relu(self.first(x))
        second = torch.relu(self.second(first)).flatten(1)
        return {"first": x, "second": first, "hidden": second, "head": torch.relu(self.hidden(second))}

    def forward(self, x: Tensor) -> Output:
        x = torch.relu(self.second(torch.relu(self.first(x))))
        return self.classify(self.drop(torch.relu(self.hidden(x.flatten(1)))))


@dataclass
class View:
    """What the server shows to a part."""

    model: FlatModel
    version: int = 3
    now: float = 0.0
    clients: tuple[str, ...] = ("a", "b", "c")
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def global_model(self) -> Tensor:
        return self.model.vector()

    @property
    def spec(self) -> Spec:
        return self.model.spec

    def model_of(self, client: str) -> Tensor:
        return self.global_model

    def rng(self, purpose: str) -> torch.Generator:
        return torch_generator(purpose)

    def compute(self, fn: Callable[..., Any], *args: Any) -> Future[Any]:
        raise AssertionError("FOT computes nothing elsewhere")


def flat(factory: Callable[[], Network], seed: int = 0) -> FlatModel:
    return FlatModel(build_model(factory, seed=seed))


def conv_model() -> FlatModel:
    return flat(SmallConv)


def mlp_model() -> FlatModel:
    return flat(lambda: MLP(input_shape=(9,), heads=(3,), hidden=(8, 7), dropout=(0.2, 0.5)))


def linear_model() -> FlatModel:
    return flat(lambda: MLP(input_shape=(4,), heads=(2,), hidden=()))


def context(model: FlatModel, x: Tensor) -> Context:
    model.set_generator(torch_generator("dropout"))
    task = Task(0, (0, 1, 2), (0, 1, 2))
    labels = torch.zeros(len(x), dtype=torch.int64)
    return Context(
        model=model, task=task, data=TaskData(x, labels), received=model.vector(), epochs=1, batch_size=4, lr=0.1,
        seed=0, client="a", local_round=1, is_new_task=False, task_columns={0: (0, 1, 2)}, num_columns=3,
    )  # fmt: skip


def images(count: int = 20, seed: int = 7) -> Tensor:
    return torch.randn(count, 1, 8, 8, generator=torch_generator(seed))


def features(count: int, width: int, seed: int = 7) -> Tensor:
    return torch.randn(count, width, generator=torch_generator(seed))


def task_end(model: FlatModel, clients: Sequence[str] = ("a", "b"), last: bool = False) -> Event:
    updates = tuple(
        Update(
            client=client, visit=0, target=GLOBAL, base_version=0, base=model.vector(), model=model.vector() + index,
            num_examples=5, weight=5.0, task=0, head=0,
        )
        for index, client in enumerate(clients)
    )  # fmt: skip
    return Event("task_end", 0, 11, last, updates)


def exchange(server: FOT, client: SubspaceResponse, model: FlatModel, samples: dict[str, Tensor]) -> None:
    """Ask and absorb, over the wire's own records."""
    view = View(model, clients=tuple(samples))
    (query,) = server.queries(task_end(model, tuple(samples)), view)
    request = record_tensors(tensors_record(query.request, live=False))
    responses = []
    for name, weights in query.models.items():
        model.load(weights)
        tensors = client.respond(context(model, samples[name]), query.name, request)
        responses.append(Response(name, len(samples[name]), record_tensors(tensors_record(tensors, live=False))))
        came = Reply(responses[-1].num_examples, payload=responses[-1].tensors)
        assert rejection(came, Expected.of("query", model.spec, query.response)) is None
    server.consume(query, responses, view)


def diagonal(*values: float) -> Tensor:
    return torch.diag(torch.tensor(values))


# -- numbers of the published code, by hand ---------------------------------------------------------------------------

QUESTION = Query("subspace", {}, {})
A = diagonal(3.0, 2.0, 1.0, 0.5)  # energies 9, 4, 1, 1/4: shares .6316, .9123, ...
R = diagonal(0.0, 0.0, 1.0, 0.5)


def setup(rank: int, **options: Any) -> FOT:
    server = FOT(epsilon=0.9, **options)
    server.setup(linear_model().spec)
    if rank:
        basis = torch.eye(4, dtype=torch.float64)[:, :rank]
        state = {"bases": {"head": basis}, "epsilon": 0.9, "extensions": 1}
        server.load_state_dict(state)
    return server


def sketched(sketch: Tensor, ratio: float, client: str = "a", num_examples: int = 3) -> Response:
    squared = torch.tensor([ratio**2]).double()
    tensors = {"head/sketch": sketch, "head/energy": torch.ones(1).double(), "head/residual": squared}
    return Response(client, num_examples, tensors)


@pytest.mark.parametrize(
    ("rank", "sketch", "ratio", "after"), [(0, A, 1.0, 2), (2, R, 0.28, 3), (2, R, 0.5, 4), (2, R, 0.05, 3)]
)
def test_the_official_variant_adds_what_the_published_code_adds(
    rank: int, sketch: Tensor, ratio: float, after: int
) -> None:
    server = setup(rank, variant="official", epsilon_increment=0.001)
    server.consume(QUESTION, [sketched(sketch, ratio)], View(linear_model()))
    assert server.basis("head").shape == (4, after)
    assert server.epsilon == pytest.approx(0.901)
    assert server.metrics()["rank/head"] == after
    assert server.metrics()["frozen_share/head"] == after / 4


def test_official_ratios_are_averaged_over_samples() -> None:
    # .9 and .2 with weights 1/4 and 3/4 give .375: eps' = .7333, one direction of the two (shares .8, .2).
    server = setup(2, variant="official")
    responses = [sketched(R / 2, 0.9, "a", 1), sketched(R / 2, 0.2, "b", 3)]
    server.consume(QUESTION, responses, View(linear_model()))
    assert server.basis("head").shape[1] == 3
    # Weighted equally it is .55, whose eps' = .8182 asks for both.
    server = setup(2, variant="official")
    responses = [sketched(R / 2, 0.9, "a", 2), sketched(R / 2, 0.2, "b", 2)]
    server.consume(QUESTION, responses, View(linear_model()))
    assert server.basis("head").shape[1] == 4


@pytest.mark.parametrize(("ratio", "after"), [(0.28, 2), (0.5, 3), (0.05, 2), (0.9, 4)])
@pytest.mark.parametrize("method", ["gram", "sketch"])
def test_the_corrected_variant_counts_energy_and_adds_nothing_below_its_share(
    method: str, ratio: float, after: int
) -> None:
    server = setup(2, method=method)
    response = sketched(R, ratio)
    if method == "gram":
        # The residual's energy is 1.25, so the rest of the inputs' lies inside the basis.
        inside = (1.25 / ratio**2 - 1.25) / 2
        response = Response("a", 3, {"head/gram": diagonal(inside, inside, 1.0, 0.25)})
    server.consume(QUESTION, [response], View(linear_model()))
    assert server.basis("head").shape == (4, after)


def test_the_first_task_keeps_epsilon_of_the_pooled_energy() -> None:
    server = setup(0)
    halves = [
        Response("a", 1, {"head/gram": diagonal(9.0, 0, 0, 0.25)}),
        Response("b", 9, {"head/gram": diagonal(0, 4.0, 1.0, 0)}),
    ]
    server.consume(QUESTION, halves, View(linear_model()))
    assert server.basis("head").abs().round(decimals=12).tolist() == [[1, 0], [0, 1], [0, 0], [0, 0]]


def test_epsilon_never_exceeds_one() -> None:
    server = setup(0, epsilon_increment=0.2)
    server.consume(QUESTION, [Response("a", 1, {"head/gram": A})], View(linear_model()))
    assert server.epsilon == 1.0


def test_inputs_without_energy_give_no_direction() -> None:
    for server, response in (
        (setup(0), Response("a", 1, {"head/gram": torch.zeros(4, 4)})),
        (setup(0, variant="official"), sketched(torch.zeros(4, 4), 0.0)),
    ):
        server.consume(QUESTION, [response], View(linear_model()))
        assert server.basis("head").shape == (4, 0)
        assert server.metrics()["answers_ignored"] == 0


# -- what clients measure ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"stride": 2, "padding": 1},
        {"stride": (1, 3), "padding": (2, 0), "dilation": (1, 2)},
        {"padding": "same", "dilation": 2},
        {"padding": "valid"},
        {"padding": (1, 2), "padding_mode": "circular"},
    ],
)
def test_patches_times_the_kernel_are_the_convolution(options: dict[str, Any]) -> None:
    conv = build_model(lambda: nn.Conv2d(2, 3, (3, 4), bias=False, **options), seed=1)
    x = torch.randn(2, 2, 9, 11, generator=torch_generator("x"))
    out = conv(x)
    by_patches = layer_rows(conv, x) @ conv.weight.reshape(3, -1).T
    torch.testing.assert_close(by_patches, out.permute(0, 2, 3, 1).reshape(-1, 3), rtol=0, atol=1e-5)


@pytest.fixture(params=["conv", "mlp"])
def case(request: pytest.FixtureRequest) -> Iterator[tuple[FlatModel, Tensor, dict[str, Tensor]]]:
    """Give a model, samples, and the materialised input matrices (D, M) of its layers."""
    with torch.no_grad():
        if request.param == "conv":
            model, x = conv_model(), images()
            reads = model.module.inputs(x)
        else:
            model, x = mlp_model(), features(20, 9)
            first, second = model.module.hidden
            reads = {"hidden.0": x, "hidden.1": torch.relu(first(x))}
            reads["head"] = torch.relu(second(reads["hidden.1"]))
        modules = dict(model.module.named_modules())
        yield model, x, {name: layer_rows(modules[name], read).double().T for name, read in reads.items()}


def test_gram_matrices_give_the_subspace_of_the_materialised_inputs(
    case: tuple[FlatModel, Tensor, dict[str, Tensor]],
) -> None:
    model, x, matrices = case
    server = FOT(epsilon=0.9)
    server.setup(model.spec)
    exchange(server, SubspaceResponse(batch_size=3), model, {"a": x[:5], "b": x[5:6], "c": x[6:]})
    for layer, matrix in matrices.items():
        left, singular, _ = torch.linalg.svd(matrix, full_matrices=False)
        held = singular.square().cumsum(0) / singular.square().sum()
        count = int((held < 0.9).sum()) + 1
        basis = server.basis(layer)
        assert basis.shape[1] == count
        expected = left[:, :count] @ left[:, :count].T
        torch.testing.assert_close(basis @ basis.T, expected, rtol=0, atol=1e-4)


def test_a_second_task_fills_the_share_up(case: tuple[FlatModel, Tensor, dict[str, Tensor]]) -> None:
    model, x, _ = case
    server = FOT(epsilon=0.9)
    server.setup(model.spec)
    client = SubspaceResponse()
    exchange(server, client, model, {"a": x})
    ranks = {layer: server.basis(layer).shape[1] for layer in server.state_dict()["bases"]}
    exchange(server, client, model, {"a": x})
    assert ranks == {layer: server.basis(layer).shape[1] for layer in ranks}
    more = torch.roll(x, 1, dims=-1) * 2 + 1
    gram = client.respond(
        context(model, more),
        "subspace",
        {f"{layer}/basis": torch.zeros(server.basis(layer).shape[0], 0) for layer in ranks},
    )
    exchange(server, client, model, {"a": more})
    for layer, rank in ranks.items():
        basis, total = server.basis(layer), gram[f"{layer}/gram"].double()
        assert float((basis.T @ total @ basis).trace() / total.trace()) >= 0.9 - 1e-6
        assert basis.shape[1] >= rank
    assert sum(server.basis(layer).shape[1] for layer in ranks) > sum(ranks.values())


def test_streaming_equals_one_batch(case: tuple[FlatModel, Tensor, dict[str, Tensor]]) -> None:
    model, x, matrices = case
    request = {f"{layer}/basis": torch.zeros(matrix.shape[0], 0) for layer, matrix in matrices.items()}
    streamed = SubspaceResponse(batch_size=3).respond(context(model, x), "subspace", request)
    at_once = SubspaceResponse(batch_size=100).respond(context(model, x), "subspace", request)
    for layer, matrix in matrices.items():
        torch.testing.assert_close(streamed[f"{layer}/gram"], at_once[f"{layer}/gram"], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(streamed[f"{layer}/gram"].double(), matrix @ matrix.T, rtol=1e-4, atol=1e-4)


def test_a_streamed_sketch_is_the_residual_times_all_the_random_rows() -> None:
    basis = torch.linalg.qr(features(6, 2))[0]
    rows, drawn = features(23, 6, seed=8), []

    def draw(count: int, width: int) -> Tensor:
        drawn.append(features(count, width, seed=100 + len(drawn)))
        return drawn[-1]

    sketch = Sketch(basis, 5, draw)
    for part in torch.split(rows, 10):
        sketch.add(part)
    found = sketch.tensors("layer")
    residual = project_out(rows, basis)
    assert [len(part) for part in drawn] == [10, 10, 3]
    torch.testing.assert_close(found["layer/sketch"], residual.T @ torch.cat(drawn), rtol=0, atol=1e-4)
    assert float(found["layer/energy"]) == pytest.approx(float(rows.square().sum()), rel=1e-5)
    assert float(found["layer/residual"]) == pytest.approx(float(residual.square().sum()), rel=1e-5)


def test_a_wide_corrected_sketch_has_the_energies_of_the_residual() -> None:
    model, x = linear_model(), features(30, 4)
    client = SubspaceResponse(method="sketch", sketch_width=40_000)
    found = client.respond(context(model, x), "subspace", {"head/basis": torch.eye(4)[:, :1]})
    expected = x.clone()
    expected[:, 0] = 0.0
    sketch = found["head/sketch"]
    torch.testing.assert_close(sketch @ sketch.T, expected.T @ expected, rtol=0.05, atol=0.5)
    assert not sketch[0].any()


def test_the_official_variant_reads_an_activation_before_its_dropout() -> None:
    model = flat(lambda: MLP(input_shape=(9,), heads=(3,), hidden=(8,), dropout=(0.5,)))
    x = features(12, 9)
    request = {"head/basis": torch.zeros(8, 0)}
    with torch.no_grad():
        before = torch.relu(model.module.hidden[0](x)).square().sum()
    official = SubspaceResponse(variant="official").respond(context(model, x), "subspace", request)
    assert float(official["head/energy"]) == pytest.approx(float(before), rel=1e-6)
    # Two hidden layers: what the second reads was dropped upstream, so training mode shows in the head's inputs.
    deep = mlp_model()
    sizes = {"hidden.0": 9, "hidden.1": 8, "head": 7}
    request = {f"{layer}/basis": torch.zeros(size, 0) for layer, size in sizes.items()}
    trained = SubspaceResponse(variant="official").respond(context(deep, x), "subspace", request)
    evaluated = SubspaceResponse(method="sketch").respond(context(deep, x), "subspace", request)
    same = {layer: torch.equal(trained[f"{layer}/energy"], evaluated[f"{layer}/energy"]) for layer in sizes}
    assert same == {"hidden.0": True, "hidden.1": True, "head": False}


def test_hooks_are_gone_after_an_answer() -> None:
    model = mlp_model()
    request = {"head/basis": torch.zeros(7, 0)}
    SubspaceResponse(variant="official").respond(context(model, features(5, 9)), "subspace", request)
    assert not [m for m in model.module.modules() if m._forward_hooks or m._forward_pre_hooks]


def test_a_layer_that_cannot_be_read_is_refused() -> None:
    grouped = flat(lambda: MLP(input_shape=(4,), heads=(2,), hidden=()))
    grouped.module.extra = nn.Conv2d(4, 4, 3, groups=2)
    for layer, kind in (("extra", "Conv2d"), ("absent", "NoneType")):
        with pytest.raises(ValueError, match=f"{layer} is {kind}"):
            SubspaceResponse().respond(
                context(grouped, features(2, 4)), "subspace", {f"{layer}/basis": torch.zeros(18, 0)}
            )


# -- what the server does with it -------------------------------------------------------------------------------------


def test_changes_are_orthogonal_to_every_basis_and_nothing_else_moves() -> None:
    model = conv_model()
    server = FOT(epsilon=0.8)
    server.setup(model.spec)
    exchange(server, SubspaceResponse(), model, {"a": images()})
    view = View(model)
    change = torch.randn(model.spec.size, generator=torch_generator("change"), dtype=torch.float64)
    kept = change.clone()
    allowed = server.apply(GLOBAL, change, view)
    assert torch.equal(change, kept)
    for layer in ("first", "second", "hidden", "head"):
        basis = server.basis(layer)
        rows = model.spec.view(allowed, f"{layer}.weight").reshape(-1, basis.shape[0])
        assert 0 < basis.shape[1] < basis.shape[0]
        assert float((rows @ basis).norm() / rows.norm()) < 1e-12
        assert float(rows.norm()) > 0.1
    for bias in ("first.bias", "hidden.bias", "head.bias"):
        assert torch.equal(model.spec.view(allowed, bias), model.spec.view(change, bias))
    again = server.apply(GLOBAL, allowed, view)
    assert float((again - allowed).norm() / allowed.norm()) < 1e-12
    other = torch.randn(model.spec.size, generator=torch_generator("other"), dtype=torch.float64)
    both = server.apply(GLOBAL, 2 * change - 3 * other, view)
    torch.testing.assert_close(both, 2 * allowed - 3 * server.apply(GLOBAL, other, view), rtol=0, atol=1e-12)


def test_an_allowed_change_leaves_old_outputs_alone() -> None:
    model = flat(lambda: MLP(input_shape=(12,), heads=(3,), hidden=()))
    old, new = features(5, 12), features(5, 12, seed=9)
    server = FOT(epsilon=1 - 1e-9)
    server.setup(model.spec)
    exchange(server, SubspaceResponse(), model, {"a": old})
    change = torch.randn(model.spec.size, generator=torch_generator("change"), dtype=torch.float64)
    model.spec.view(change, "head.bias").zero_()
    before_old, before_new = model(old).logits.detach(), model(new).logits.detach()
    model.load((model.vector().double() + server.apply(GLOBAL, change, View(model))).float())
    torch.testing.assert_close(model(old).logits, before_old, rtol=0, atol=1e-4)
    assert float((model(new).logits.detach() - before_new).abs().mean()) > 0.3


def test_before_the_first_task_ends_every_change_is_allowed() -> None:
    model = mlp_model()
    server = FOT()
    server.setup(model.spec)
    change = torch.randn(model.spec.size, dtype=torch.float64, generator=torch_generator("c"))
    assert torch.equal(server.apply(GLOBAL, change, View(model)), change)


def test_the_heads_of_tasks_are_left_out_and_a_shared_head_is_not() -> None:
    per_task, single = FOT(), FOT()
    per_task.setup(flat(lambda: SmallConv((2, 2))).spec)
    single.setup(conv_model().spec)
    ranks = [{name for name in server.metrics() if name.startswith("rank/")} for server in (per_task, single)]
    assert ranks[0] == {"rank/first", "rank/second", "rank/hidden"}
    assert ranks[1] == ranks[0] | {"rank/head"}


def test_layers_can_be_named_and_wrong_ones_are_refused() -> None:
    chosen = FOT(layers=["hidden.0.weight"])
    chosen.setup(mlp_model().spec)
    assert {name for name in chosen.metrics() if name.startswith("rank/")} == {"rank/hidden.0"}
    for layers, reason in ((["nope"], "nope is no tensor"), ([], "leaves no weight"), (["head.bias"], "head.bias of")):
        with pytest.raises(ValueError, match=reason):
            FOT(layers=layers).setup(mlp_model().spec)
    with pytest.raises(ValueError, match="method=gram"):
        FOT(variant="official", method="gram").setup(mlp_model().spec)


def test_whom_it_asks_and_when() -> None:
    model = mlp_model()
    view, event = View(model), task_end(model)
    official, everybody, some = FOT(variant="official"), FOT(), FOT(asks="updated")
    for server in (official, everybody, some):
        server.setup(model.spec)
        assert server.queries(task_end(model, last=True), view) == []
        assert server.queries(Event("round_end", 0, 3, False, event.updates), view) == []
    (query,) = official.queries(event, view)
    assert list(query.models) == ["a", "b"]
    assert torch.equal(query.models["b"], model.vector() + 1)
    (query,) = everybody.queries(event, view)
    assert list(query.models) == ["a", "b", "c"]
    assert all(torch.equal(sent, model.vector()) for sent in query.models.values())
    assert list(some.queries(event, view)[0].models) == ["a", "b"]
    assert some.queries(task_end(model, clients=()), view) == []
    ended = FOT(asks="ended")
    ended.setup(model.spec)
    (query,) = ended.queries(replace(event, clients=("b",)), view)
    assert list(query.models) == ["b"]
    assert ended.queries(event, view) == []
    assert [server.keeps_updates for server in (official, everybody, some, ended)] == [True, False, True, False]
    with pytest.raises(ValueError, match="asks=ended: with extend_at=2 no task ends"):
        FOT(asks="ended", extend_at=2).setup(model.spec)


def test_without_task_ends_it_asks_every_so_many_rounds() -> None:
    model = mlp_model()
    view = View(model)
    server = FOT(extend_at=3)
    server.setup(model.spec)
    kinds: list[Literal["round_end", "task_end"]] = ["round_end", "task_end"]
    for server_round in range(12):
        for kind in kinds:
            asked = server.queries(Event(kind, 0, server_round, server_round == 11), view)
            assert bool(asked) == (server_round in (2, 5, 8))


def test_a_stream_in_which_no_task_ends_is_noted() -> None:
    def work(num_tasks: int) -> LocalWork:
        stream = SimpleNamespace(num_tasks=num_tasks)
        return LocalWork(linear_model(), LocalTraining(1, 4, lr=0.1), cast(Any, stream), (4,))

    for server, num_tasks, kinds in (
        (FOT(), 1, ["subspace_never_extended"]),
        (FOT(), 2, []),
        (FOT(extend_at=2), 1, []),
    ):
        server.setup(linear_model().spec)
        server.bind(work(num_tasks))
        assert [note["kind"] for note in server.notes()] == kinds
        assert server.notes() == []


# -- what else may be kept from changing -------------------------------------------------------------------------------


class Normed(Network):
    """A convolution, batch normalisation, a hidden layer, group normalisation."""

    def __init__(self, heads: Sequence[int] = (3,)) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.batch = nn.BatchNorm2d(4)
        self.hidden = nn.Linear(4 * 36, 6)
        self.group = nn.GroupNorm(2, 6)
        self.attach_heads(6, heads)

    def forward(self, x: Tensor) -> Output:
        x = torch.relu(self.batch(self.conv(x)))
        return self.classify(torch.relu(self.group(self.hidden(x.flatten(1)))))


NORMS = {"batch.weight", "batch.bias", "batch.running_mean", "batch.running_var", "group.weight", "group.bias"}
BIASES = {"conv.bias", "hidden.bias", "head.bias"}


@pytest.mark.parametrize(
    ("options", "frozen"),
    [
        ({}, set()),
        ({"biases": "freeze"}, BIASES),
        ({"norms": "freeze"}, NORMS),
        ({"biases": "freeze", "norms": "freeze"}, BIASES | NORMS),
        ({"biases": "freeze", "project_heads": False}, BIASES - {"head.bias"}),
    ],
)
def test_biases_and_norms_are_averaged_or_frozen_after_the_first_extension(
    options: dict[str, Any], frozen: set[str]
) -> None:
    model = flat(Normed)
    server = FOT(epsilon=0.8, **options)
    server.setup(model.spec)
    change = torch.randn(model.spec.size, generator=torch_generator("change"), dtype=torch.float64)
    assert torch.equal(server.apply(GLOBAL, change, View(model)), change)
    exchange(server, SubspaceResponse(), model, {"a": images()})
    allowed = server.apply(GLOBAL, change, View(model))
    still = {t.name for t in model.spec if not model.spec.view(allowed, t.name).any()}
    assert still == frozen
    free = BIASES | NORMS if options.get("project_heads", True) else BIASES | NORMS | {"head.weight"}
    for name in free - frozen:
        assert torch.equal(model.spec.view(allowed, name), model.spec.view(change, name))
    for name in {"conv.weight", "hidden.weight"}:
        assert not torch.equal(model.spec.view(allowed, name), model.spec.view(change, name))


def test_the_heads_of_tasks_keep_their_biases() -> None:
    model = flat(lambda: Normed((2, 2)))
    server = FOT(epsilon=0.8, biases="freeze", norms="freeze")
    server.setup(model.spec)
    exchange(server, SubspaceResponse(), model, {"a": images()})
    allowed = server.apply(GLOBAL, torch.ones(model.spec.size, dtype=torch.float64), View(model))
    for name in ("heads.0.bias", "heads.1.bias", "heads.0.weight"):
        assert bool((model.spec.view(allowed, name) == 1).all())


def test_a_shared_head_can_be_left_free() -> None:
    model = mlp_model()
    free = FOT(project_heads=False)
    free.setup(model.spec)
    assert {name for name in free.metrics() if name.startswith("rank/")} == {"rank/hidden.0", "rank/hidden.1"}
    named = FOT(project_heads=False, layers=["head.weight"])
    named.setup(model.spec)
    assert {name for name in named.metrics() if name.startswith("rank/")} == {"rank/head"}


class Mixed(Network):
    """Layers whose inputs can be read, and others."""

    def __init__(self, heads: Sequence[int] = (3,)) -> None:
        super().__init__()
        self.positions = nn.Parameter(torch.zeros(4, 6))
        self.grouped = nn.Conv2d(2, 4, 3, groups=2)
        self.embedding = nn.Embedding(5, 6)
        self.hidden = nn.Linear(6, 6)
        self.attach_heads(6, heads)

    def forward(self, x: Tensor) -> Output:
        return self.classify(self.hidden(x))


def test_what_cannot_be_read_is_left_out_and_noted() -> None:
    model = flat(Mixed)
    stream = cast(Any, SimpleNamespace(num_tasks=2))
    work = LocalWork(model, LocalTraining(1, 4, lr=0.1), stream, (6,))
    server = FOT()
    server.setup(model.spec)
    server.bind(work)
    assert {name for name in server.metrics() if name.startswith("rank/")} == {"rank/hidden", "rank/head"}
    left = ["positions", "grouped.weight", "embedding.weight"]
    assert server.notes() == [{"kind": "weights_unprotected", "weights": left}]
    exchange(server, SubspaceResponse(), model, {"a": features(9, 6)})
    assert server.basis("hidden").shape[1] > 0
    named = FOT(layers=["embedding.weight", "hidden.weight"])
    named.setup(model.spec)
    with pytest.raises(ValueError, match="embedding is no linear layer"):
        named.bind(work)


def test_a_nearly_full_layer_is_noted_once() -> None:
    server = setup(2)
    question = Response("a", 3, {"head/gram": torch.eye(4)})
    server.consume(QUESTION, [question], View(linear_model()))
    assert server.metrics()["frozen_share/head"] == 1.0
    (note,) = server.notes()
    assert note == {"kind": "subspace_nearly_full", "layer": "head", "share": 1.0}
    tree, tensors = pack(server.state_dict())
    resumed = setup(0)
    resumed.load_state_dict(unpack(tree, tensors))
    for each in (server, resumed):
        each.consume(QUESTION, [question], View(linear_model()))
        assert each.notes() == []


# -- the range finder --------------------------------------------------------------------------------------------------


def test_a_full_range_finder_finds_what_gram_matrices_find(
    case: tuple[FlatModel, Tensor, dict[str, Tensor]],
) -> None:
    model, x, matrices = case
    exact, ranges = FOT(epsilon=0.9), FOT(epsilon=0.9, method="range_finder", sketch_width=1000)
    samples = {"a": x[:5], "b": x[5:6], "c": x[6:]}
    more = {name: torch.roll(part, 1, dims=-1) * 2 + 1 for name, part in samples.items()}
    for server, client in (
        (exact, SubspaceResponse()),
        (ranges, SubspaceResponse(method="range_finder", batch_size=3)),
    ):
        server.setup(model.spec)
        exchange(server, client, model, samples)
        exchange(server, client, model, more)
    for layer in matrices:
        one, other = exact.basis(layer), ranges.basis(layer)
        assert one.shape == other.shape
        torch.testing.assert_close(one @ one.T, other @ other.T, rtol=0, atol=1e-3)
    assert ranges.notes() == exact.notes()


@pytest.mark.parametrize(("width", "more"), [(15, 5), (30, 2), (60, 0)])
def test_a_narrow_range_finder_keeps_the_share_it_promises(width: int, more: int) -> None:
    # 60 inputs whose energies fall as 1/k^2: it takes 10 directions. A narrow sketch never gives too few.
    basis = torch.linalg.qr(features(60, 60, seed=3))[0]
    x = (features(200, 60) / torch.arange(1, 61)) @ basis.T
    model = flat(lambda: MLP(input_shape=(60,), heads=(2,), hidden=()))
    server = FOT(epsilon=0.95, method="range_finder", sketch_width=width)
    server.setup(model.spec)
    exchange(server, SubspaceResponse(method="range_finder"), model, {"a": x[:120], "b": x[120:]})
    found, gram = server.basis("head"), (x.T @ x).double()
    held = torch.linalg.eigvalsh(gram).flip(0).cumsum(0) / gram.trace()
    fewest = int((held < 0.95).sum()) + 1
    assert fewest <= found.shape[1] <= fewest + more
    captured = float((found.T @ gram @ found).trace() / gram.trace())
    assert captured >= 0.95
    assert captured >= float(held[found.shape[1] - 1]) - 0.015


def test_a_range_finder_that_is_too_narrow_gives_all_it_has_and_says_so() -> None:
    model = flat(lambda: MLP(input_shape=(40,), heads=(2,), hidden=()))
    server = FOT(epsilon=0.9, method="range_finder", sketch_width=6)
    server.setup(model.spec)
    client = SubspaceResponse(method="range_finder")
    for _ in range(2):
        exchange(server, client, model, {"a": features(200, 40)})
    assert server.basis("head").shape[1] == 12
    assert server.notes() == [{"kind": "sketch_too_narrow", "layer": "head", "width": 6}] * 2


def test_official_knows_no_range_finder() -> None:
    with pytest.raises(ValueError, match="method=range_finder: variant=official sends sketches"):
        FOT(variant="official", method="range_finder").setup(mlp_model().spec)


def test_state_survives_a_round_trip_through_a_checkpoint() -> None:
    model = conv_model()
    server = FOT(epsilon=0.8, epsilon_increment=0.05)
    server.setup(model.spec)
    exchange(server, SubspaceResponse(), model, {"a": images()})
    tree, tensors = pack(server.state_dict())
    restored = FOT(epsilon=0.8, epsilon_increment=0.05)
    restored.setup(model.spec)
    restored.load_state_dict(unpack(tree, tensors))
    assert equal(restored.state_dict(), server.state_dict())
    assert restored.metrics() == server.metrics()
    assert restored.epsilon == pytest.approx(0.85)
    change = torch.randn(model.spec.size, dtype=torch.float64, generator=torch_generator("c"))
    view = View(model)
    assert torch.equal(restored.apply(GLOBAL, change, view), server.apply(GLOBAL, change, view))
    for each in (server, restored):
        exchange(each, SubspaceResponse(), model, {"a": images(seed=11)})
    assert equal(restored.state_dict(), server.state_dict())


def test_a_basis_cannot_forget_and_says_so() -> None:
    request = ForgetRequest("r", "client", clients=("a",))
    assert setup(0).forget(request).outcome == "not applicable"
    assert setup(2).forget(request).outcome == "retained"


# -- the whole of it --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [[], ["method=sketch", "sketch_width=12"], ["method=range_finder", "sketch_width=12"], ["variant=official"]],
)
def test_a_run_fills_the_bases_task_by_task(options: list[str], tmp_path: Path) -> None:
    from fedcl.config.compose import compose
    from fedcl.runs.experiment import run

    overrides = [
        "backend=inline", "scenario.num_tasks=5", "rounds_per_task=1", "num_clients=3", "model.hidden=[16]",
        "compare_with=null", f"run_dir={tmp_path / 'run'}", "strategy/projection=fot",
        "strategy.projection.server.epsilon=0.8",
        *(f"strategy.projection.server.{option}" for option in options),
    ]  # fmt: skip
    folder = run(compose(overrides), overrides, [], True)
    table = pd.read_parquet(folder / "metrics.parquet")
    numbers = table[table["phase"] == "server"].set_index(["name", "round"])["value"]
    ranks = [numbers["projection/rank/hidden.0", server_round] for server_round in range(5)]
    assert 0 < ranks[0] < ranks[1]
    assert ranks[2] <= ranks[3] == ranks[4] <= 64
    assert numbers["projection/answers_ignored", 4] == 0
    assert not [name for name in numbers.index.get_level_values("name") if "heads" in name]


def test_a_run_without_task_ends_extends_by_rounds(tmp_path: Path) -> None:
    from fedcl.config.compose import compose
    from fedcl.runs.experiment import run

    overrides = [
        "backend=inline", "scenario=joint", "rounds_per_task=5", "num_clients=3", "model.hidden=[16]",
        "compare_with=null", f"run_dir={tmp_path / 'run'}", "strategy/projection=fot",
        "strategy.projection.server.epsilon=0.8", "strategy.projection.server.extend_at=2",
        "strategy.projection.server.epsilon_increment=0.05",
    ]  # fmt: skip
    folder = run(compose(overrides), overrides, [], True)
    table = pd.read_parquet(folder / "metrics.parquet")
    numbers = table[table["phase"] == "server"].set_index(["name", "round"])["value"]
    assert [numbers["projection/extensions", server_round] for server_round in range(5)] == [0, 1, 1, 2, 2]
    assert numbers["projection/epsilon", 4] == pytest.approx(0.9)
    assert 0 < numbers["projection/rank/hidden.0", 1] < numbers["projection/rank/hidden.0", 3]


@pytest.mark.parametrize("options", [["asks=all", "method=range_finder"], ["asks=ended"], ["variant=official"]])
def test_clients_at_different_tasks_extend_at_each_end(options: list[str], tmp_path: Path) -> None:
    from fedcl.config.compose import compose
    from fedcl.runs.experiment import run

    overrides = [
        "backend=inline", "scenario.num_tasks=5", "scenario/schedule=asynchronous", "rounds_per_task=2",
        "num_clients=3", "model.hidden=[16]", "compare_with=null", f"run_dir={tmp_path / 'run'}",
        "strategy/projection=fot", "strategy.projection.server.epsilon=0.5",
        "strategy.projection.server.epsilon_increment=0.01",
        *(f"strategy.projection.server.{option}" for option in options),
    ]  # fmt: skip
    folder = run(compose(overrides), overrides, [], True)
    table = pd.read_parquet(folder / "metrics.parquet")
    numbers = table[table["phase"] == "server"].set_index(["name", "round"])["value"]
    extensions = numbers["projection/extensions"].to_numpy()
    assert extensions[-1] > 4  # more than the four ends of a synchronous run
    assert set(extensions[1:] - extensions[:-1]) <= {0.0, 1.0}
    assert numbers["projection/epsilon"].to_numpy() == pytest.approx(0.5 + 0.01 * extensions)
    ranks = numbers["projection/rank/hidden.0"].to_numpy()
    assert (ranks[1:] >= ranks[:-1]).all()
    assert ranks[-1] > 0
    assert numbers["projection/answers_ignored"].max() == 0
