from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fedcl.base.randomness import torch_generator
from fedcl.base.tree import equal, pack, unpack
from fedcl.contracts.learner import LocalTraining
from fedcl.contracts.requests import ForgetRequest
from fedcl.contracts.strategy import GLOBAL, LocalWork, Update
from fedcl.models.flat import FlatModel, Spec, TensorSpec
from fedcl.models.masks import common_bits, count_bits, pack_bits, unpack_bits
from fedcl.models.networks import MLP
from fedcl.scenario.streams import Joint
from fedcl.server.strategy import Pipeline
from strategies.collaboration.fedcac import (
    FedCAC,
    collaboration_threshold,
    collaborators,
    critical_mask,
    overlap,
    overlap_packed,
)
from tests.toy import configure, run_toy, write_files

GOLDEN = [
    TensorSpec("a", (2, 3), 0, 6, "parameter", None),
    TensorSpec("b", (3,), 6, 9, "parameter", None),
]
OLD = torch.tensor([1, 2, -3, 0.5, 0, 1, 0.1, 0.2, 0.3])
NEW = torch.tensor([1.1, 1.9, -3, 0.6, 0.4, 1.5, 0.1, 0.25, 0.2])


@pytest.mark.parametrize(
    ("tau", "expected"),
    [
        (0.5, [0, 1, 0, 0, 1, 1, 0, 0, 1]),
        (0.34, [0, 1, 0, 0, 0, 1, 0, 0, 1]),
        (1.0, [1, 1, 0, 1, 1, 1, 0, 1, 1]),
        (0.1, [0, 0, 0, 0, 0, 0, 0, 0, 0]),
    ],
)
def test_masks_of_the_authors_function(tau: float, expected: list[int]) -> None:
    assert critical_mask(OLD, NEW, GOLDEN, tau).int().tolist() == expected


def one(size: int) -> list[TensorSpec]:
    return [TensorSpec("w", (size,), 0, size, "parameter", None)]


@pytest.mark.parametrize(
    ("old", "new", "tau", "expected"),
    [
        ([0, 0, 0, 0], [2, 2, 2, 1], 0.25, [1, 1, 1, 0]),  # ties with the last one pass
        ([1, 2, 3, 4], [1, 2, 3, 4], 0.5, [1, 1, 1, 1]),  # nothing moved: all pass
        ([1, 2, 3, 4], [0, 0, 0, 0], 0.5, [1, 1, 1, 1]),  # the weight after training counts, not the one before
        ([1, 2, 3, 0], [1, 2, 3, 4], 0.5, [0, 0, 0, 1]),  # the second largest is 0: the smallest positive replaces it
        ([1, 1, 1, 1], [1, 1 + 2**-20, 1 + 2**-23, 1], 1.0, [0, 1, 1, 0]),
        ([0, 0, 0, 0], [1e-5, 2e-6, 1e-9, 0], 0.75, [1, 1, 1, 0]),  # 1e-18 is above 1e-20
        ([0, 0, 0, 0], [1e-5, 2e-6, 1e-11, 0], 0.75, [1, 1, 0, 0]),  # 1e-22 is not
        ([0, 0, 0], [1, 2, 3], 0.333, [0, 0, 0]),  # int(0.999) is none
        ([0, 0, 0], [1, 2, 3], 0.34, [0, 0, 1]),
    ],
)
def test_edge_cases_of_the_mask(old: list[float], new: list[float], tau: float, expected: list[int]) -> None:
    mask = critical_mask(torch.tensor(old).float(), torch.tensor(new).float(), one(len(old)), tau)
    assert mask.int().tolist() == expected


def test_elements_of_no_tensor_are_not_critical() -> None:
    assert critical_mask(OLD, NEW, GOLDEN[1:], 1.0).int().tolist() == [0] * 7 + [1, 1]


MASKS = torch.tensor([[1, 1, 0, 0], [1, 0, 1, 0], [1, 1, 1, 1]], dtype=torch.bool)


def test_overlap_by_hand_is_not_symmetric() -> None:
    # |M0-M1| = 2, |M0-M2| = 2, |M1-M2| = 2; sizes 2, 2, 4
    expected = [[1, 0.5, 0.5], [0.5, 1, 0.5], [0.75, 0.75, 1]]
    assert overlap(MASKS).tolist() == expected


def test_overlap_equals_the_double_loop() -> None:
    masks = torch.rand(7, 500, generator=torch_generator(1)) < torch.rand(7, 1, generator=torch_generator(2))
    found = overlap(masks)
    for i in range(7):
        for j in range(7):
            distance = (masks[i].int() - masks[j].int()).abs().sum().item()
            assert found[i, j] == 1 - distance / (2 * masks[i].sum().item())


@pytest.mark.parametrize("size", [1, 8, 1003, 300_001])  # the last in several pieces
def test_packed_overlap_is_exact(size: int) -> None:
    masks = torch.rand(5, size, generator=torch_generator(size)) < torch.tensor([0.1, 0.5, 0.5, 0.9, 1.0])[:, None]
    packed = pack_bits(masks)
    assert packed.dtype == torch.uint8
    assert packed.shape == (5, -(-size // 8))
    assert torch.equal(unpack_bits(packed, size), masks)
    assert torch.equal(common_bits(packed), masks.long() @ masks.long().T)
    assert torch.equal(count_bits(packed), masks.sum(1))
    assert torch.equal(overlap_packed(packed, size), overlap(masks))


def test_packed_masks_of_another_size_are_refused() -> None:
    with pytest.raises(ValueError, match="have 1 bytes: 9 positions need 2"):
        overlap_packed(pack_bits(MASKS), 9)
    with pytest.raises(ValueError, match=r"must be uint8 \(\.\.\., 2\)"):
        unpack_bits(pack_bits(MASKS), 9)
    with pytest.raises(ValueError, match="must be uint8"):
        unpack_bits(MASKS[:, :1], 4)


def test_a_client_without_critical_parameters_overlaps_with_nobody() -> None:
    masks = MASKS.clone()
    masks[0] = False
    assert overlap(masks)[0].tolist() == [1, 0, 0]
    assert bool(torch.isfinite(overlap(masks)).all())


def test_threshold_by_hand() -> None:
    table = torch.tensor([[1, 0.5, 0.5], [0.5, 1, 0.5], [0.75, 0.75, 1]], dtype=torch.float64)
    mean, highest = 3.5 / 6, 0.75
    for t in (1, 2, 5):
        assert collaboration_threshold(table, t, 4) == pytest.approx(mean + t / 4 * (highest - mean), abs=1e-15)
    assert collaboration_threshold(table, 4, 4) == highest
    assert collaborators(table, highest).int().tolist() == [[1, 0, 0], [0, 1, 0], [1, 1, 1]]
    assert collaborators(table, collaboration_threshold(table, 5, 4)).int().tolist() == torch.eye(3).int().tolist()


@pytest.mark.parametrize("beta", [1, 3, 7, 10, 49])
def test_the_closest_pair_passes_at_beta_and_nobody_after(beta: int) -> None:
    generator = torch_generator(beta)
    for _ in range(100):  # rounding must not decide: a threshold one bit too high would lock the pair out
        table = torch.rand(6, 6, generator=generator, dtype=torch.float64).fill_diagonal_(1)
        pairs = [
            int(collaborators(table, collaboration_threshold(table, t, beta)).sum()) - 6 for t in range(1, beta + 2)
        ]
        assert pairs == sorted(pairs, reverse=True)
        assert pairs[-2:] == [1, 0]


def test_two_clients_alike_in_size_always_collaborate() -> None:
    table = overlap(torch.tensor([[1, 1, 0], [0, 1, 1]], dtype=torch.bool))
    assert collaborators(table, collaboration_threshold(table, 1000, 3)).all()


def test_one_client_alone() -> None:
    assert collaborators(overlap(MASKS[:1]), collaboration_threshold(overlap(MASKS[:1]), 1, 1)).tolist() == [[True]]


@dataclass
class View:
    spec: Spec
    models: dict[str, Tensor] = field(default_factory=dict)
    pipeline: Pipeline | None = None
    version: int = 0
    clients: tuple[str, ...] = ("0", "1", "2")

    @property
    def global_model(self) -> Tensor:
        return self.models[GLOBAL]

    def model_of(self, client: str) -> Tensor:
        assert self.pipeline is not None
        return self.models.get(self.pipeline.target_of(client, self), self.global_model)  # type: ignore[arg-type]

    def model_at(self, target: str) -> Tensor:
        return self.models.get(target, self.global_model)


def update(client: int, base: Tensor, model: Tensor, weight: int, head: int = 0) -> Update:
    return Update(str(client), 0, GLOBAL, 0, base, model, weight, float(weight), head, head)


W = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 11, 12]], dtype=torch.float32)
MOVED = torch.tensor([[1, 1, 0, 0], [1, 0, 1, 0], [1, 1, 0, 0]], dtype=torch.bool)
SIZES = [1, 1, 2]


def round_of(clients: list[int]) -> list[Update]:
    """Client i returns W[i]; where MOVED, the weight came from 0: with tau = 1/2 those two are its critical ones."""
    return [update(i, W[i].masked_fill(MOVED[i], 0), W[i], SIZES[i]) for i in clients]


def masks_of(part: FedCAC, spec: Spec) -> dict[str, Tensor]:
    return {client: unpack_bits(packed, spec.size) for client, packed in part.state_dict()["masks"].items()}


def system(beta: int, spec: Spec | None = None) -> tuple[Pipeline, FedCAC, View]:
    part = FedCAC(tau=0.5, beta=beta)
    pipeline = Pipeline(collaboration=part)
    view = View(spec or Spec(one(4)), {GLOBAL: torch.zeros(4)}, pipeline)
    pipeline.setup(view.spec)
    return pipeline, part, view


def test_a_round_by_hand() -> None:
    # overlaps: 0 and 2 agree (1), 1 with either 0.5; mean 4/6; beta 2 gives eps = 5/6, then 1, then 7/6
    pipeline, part, view = system(beta=2)
    assert part.message_for("0", view) == (GLOBAL, {})  # type: ignore[arg-type]
    models = pipeline.aggregate(round_of([0, 1, 2]), view)  # type: ignore[arg-type]
    assert models[GLOBAL].tolist() == [6, 7, 8, 9]
    assert models["0"].tolist() == [5, 6, 8, 9]  # critical: mean of 0 and 2; elsewhere global
    assert models["1"].tolist() == [5, 7, 7, 9]  # critical: its own
    assert models["2"].tolist() == [5, 6, 8, 9]
    assert part.metrics()["threshold"] == pytest.approx(5 / 6, abs=1e-15)
    assert part.metrics()["collaborators"] == pytest.approx(2 / 3)
    assert part.message_for("0", view) == ("0", {})  # type: ignore[arg-type]
    assert pipeline.aggregate(round_of([0, 1, 2]), view)["0"].tolist() == [5, 6, 8, 9]  # type: ignore[arg-type]
    assert pipeline.aggregate(round_of([0, 1, 2]), view)["0"].tolist() == [1, 2, 8, 9]  # type: ignore[arg-type]


def test_partial_participation_keeps_everybody_known() -> None:
    pipeline, part, view = system(beta=2)
    first = pipeline.aggregate(round_of([0]), view)  # type: ignore[arg-type]
    assert set(first) == {GLOBAL, "0"}
    assert first["0"].tolist() == [1, 2, 3, 4]
    assert part.message_for("2", view) == (GLOBAL, {})  # type: ignore[arg-type]
    view.models |= first
    second = pipeline.aggregate([None, *round_of([2])], view)  # type: ignore[arg-type]
    assert second[GLOBAL].tolist() == [9, 10, 11, 12]  # of this round's clients
    assert second["0"].tolist() == [5, 6, 11, 12]  # client 0 was away: last model and mask, new global
    assert second["2"].tolist() == [5, 6, 11, 12]
    assert part.metrics()["oldest_model"] == 1.0


def test_nobody_came() -> None:
    pipeline, part, view = system(beta=2)
    assert pipeline.aggregate([None, None], view) == {}  # type: ignore[arg-type]
    assert part.state_dict()["aggregations"] == 0


def test_buffers_stay_the_clients_own() -> None:
    spec = Spec([*one(2), TensorSpec("bn.running_mean", (2,), 2, 4, "buffer", None)])
    pipeline, part, view = system(beta=2, spec=spec)
    models = pipeline.aggregate(round_of([0, 1, 2]), view)  # type: ignore[arg-type]
    for i in range(3):
        assert models[str(i)][2:].tolist() == W[i, 2:].tolist()
    assert models[GLOBAL][2:].tolist() == [8, 9]
    assert not any(mask[2:].any() for mask in masks_of(part, spec).values())


def test_a_head_counts_only_those_that_trained_it() -> None:
    spec = Spec(
        [
            TensorSpec("heads.0.weight", (2,), 0, 2, "parameter", 0),
            TensorSpec("heads.1.weight", (2,), 2, 4, "parameter", 1),
        ]
    )
    pipeline, part, view = system(beta=1, spec=spec)
    view.models[GLOBAL] = torch.tensor([0.0, 0.0, 50.0, 60.0])
    base = view.global_model
    # both train head 0; weight decay moves head 1, which is no contribution
    task0 = [update(i, base, torch.tensor([a, b, 49.0, 59.0]), 1, head=0) for i, (a, b) in enumerate([(1, 2), (5, 4)])]
    models = pipeline.aggregate(task0, view)  # type: ignore[arg-type]
    assert models[GLOBAL].tolist() == [3, 3, 50, 60]
    assert models["0"].tolist() == [3, 3, 50, 60]
    masks = masks_of(part, spec)
    assert masks["0"].int().tolist() == [0, 1, 0, 0]
    assert masks["1"].int().tolist() == [1, 0, 0, 0]
    view.models |= models
    task1 = [update(0, models["0"], torch.tensor([3.0, 1.0, 70.0, 60.0]), 1, head=1)]
    models = pipeline.aggregate(task1, view)  # type: ignore[arg-type]
    assert models[GLOBAL].tolist() == [3, 3, 70, 60]  # head 0 as it was: nobody trained it
    assert part.state_dict()["models"]["0"].tolist() == [3, 3, 70, 60]
    assert masks_of(part, spec)["0"].int().tolist() == [0, 1, 1, 0]  # of head 0, from when it was trained


def naive(known: dict[str, tuple[Tensor, Tensor]], weights: dict[str, float], t: int, beta: int) -> dict[str, Tensor]:
    """The paper's formulas with loops over clients."""
    clients = list(known)
    total = sum(weights.values())
    global_P = sum(
        (w / total * known[c][0].double() for c, w in weights.items()), torch.zeros(len(known[clients[0]][0]))
    )
    table = {
        (i, j): 1 - (known[i][1].int() - known[j][1].int()).abs().sum().item() / (2 * known[i][1].sum().item())
        for i in clients
        for j in clients
        if i != j
    }
    mean, highest = sum(table.values()) / len(table), max(table.values())
    eps = mean + t / beta * (highest - mean)
    result = {GLOBAL: global_P}
    for i in clients:
        members = [i] + [j for j in clients if j != i and table[i, j] >= eps]
        customised = torch.stack([known[j][0].double() for j in members]).mean(0)
        result[i] = torch.where(known[i][1], customised, global_P)
    return result


def test_against_plain_loops_over_many_rounds() -> None:
    size = 60
    spec = Spec([TensorSpec("a", (40,), 0, 40, "parameter", None), TensorSpec("b", (20,), 40, 60, "parameter", None)])
    part = FedCAC(tau=0.4, beta=5)
    pipeline = Pipeline(collaboration=part)
    view = View(spec, {GLOBAL: torch.randn(size, generator=torch_generator(0))}, pipeline)
    pipeline.setup(spec)
    generator = torch_generator("rounds")
    known: dict[str, tuple[Tensor, Tensor]] = {}
    collaborated = set()
    for t in range(1, 8):
        present = [i for i in range(6) if t == 1 or torch.rand((), generator=generator) < 0.6]
        updates = []
        for i in present:
            base = view.model_of(str(i))
            model = base + 0.3 * torch.randn(size, generator=generator) * torch.rand(size, generator=generator)
            updates.append(update(i, base, model, i + 1))
            known[str(i)] = (model, critical_mask(base, model, list(spec), 0.4))
        expected = naive(known, {u.client: u.weight for u in updates}, t, 5)
        models = pipeline.aggregate(updates, view)  # type: ignore[arg-type]
        assert models.keys() == expected.keys()
        for target, model in models.items():
            torch.testing.assert_close(model, expected[target].float(), rtol=1e-6, atol=1e-6)
        collaborated.add(part.metrics()["collaborators"])
        view.models |= models
    assert len(collaborated) > 2
    assert min(collaborated) == 0


def test_state_survives_storage() -> None:
    pipeline, part, view = system(beta=2)
    view.models |= pipeline.aggregate(round_of([0, 1]), view)  # type: ignore[arg-type]
    tree, tensors = pack(part.state_dict())
    other = FedCAC(tau=0.5, beta=2)
    other.load_state_dict(unpack(json.loads(json.dumps(tree)), {k: v.clone() for k, v in tensors.items()}))
    assert equal(other.state_dict(), part.state_dict())
    assert other.metrics() == part.metrics()
    ours = part.combine(round_of([2]), view)  # type: ignore[arg-type]
    theirs = other.combine(round_of([2]), view)  # type: ignore[arg-type]
    assert equal(ours, theirs)
    assert set(ours) == {GLOBAL, "0", "1", "2"}


def test_forgetting() -> None:
    _, part, view = system(beta=2)
    part.combine(round_of([0, 1, 2]), view)  # type: ignore[arg-type]
    assert part.forget(ForgetRequest("r", "client", clients=("7",))).outcome == "not applicable"
    residual = part.forget(ForgetRequest("r", "client", clients=("2",)))
    assert residual.outcome == "retained"
    assert part.message_for("2", view)[0] == GLOBAL  # type: ignore[arg-type]
    models = part.combine(round_of([0, 1]), view)  # type: ignore[arg-type]
    assert set(models) == {GLOBAL, "0", "1"}
    assert models["0"].tolist()[:2] != [5, 6]  # client 2 is no longer in its customised model
    assert part.forget(ForgetRequest("r", "class", classes=(1,))).outcome == "reset"
    assert set(part.combine(round_of([1]), view)) == {GLOBAL, "1"}  # type: ignore[arg-type]


@pytest.mark.parametrize(("beta", "rounds", "horizon"), [(0.5, 20, 10), (0.34, 50, 17), (0.01, 20, 1), (7, 20, 7)])
def test_beta_may_be_a_share_of_the_rounds(beta: float, rounds: int, horizon: int) -> None:
    shared, counted = FedCAC(beta=beta), FedCAC(beta=horizon)
    shared.bind(work(rounds))
    for t in range(1, horizon + 2):
        results = []
        for part in (shared, counted):
            view = View(Spec(one(4)), {GLOBAL: torch.zeros(4)})
            results.append(part.combine(round_of([0, 1, 2]), view))  # type: ignore[arg-type]
        assert equal(*results)
        assert (shared.metrics()["collaborators"] > 0) == (t <= horizon)


def work(rounds: int) -> LocalWork:
    model = FlatModel(MLP(input_shape=(1, 2, 2), heads=[2], hidden=[]))
    return LocalWork(
        model, LocalTraining(), Joint(num_classes=2, input_shape=(1, 2, 2), seed=0), (1, 2, 2), num_rounds=rounds
    )


def test_a_share_of_unknown_rounds_is_refused() -> None:
    with pytest.raises(RuntimeError, match=r"beta=0\.5 is a share of the rounds"):
        FedCAC(beta=0.5).combine(round_of([0]), View(Spec(one(4))))  # type: ignore[arg-type]


def sent(client: int, mask: Tensor) -> Update:
    return replace(round_of([client])[0], payload={"critical": mask})


def test_masks_from_the_clients_take_the_place_of_computed_ones() -> None:
    spec = Spec([*one(2), TensorSpec("bn.running_mean", (2,), 2, 4, "buffer", None)])
    part = FedCAC(tau=0.5, beta=2, masks="client")
    view = View(spec, {GLOBAL: torch.zeros(4)})
    masks = [torch.tensor(bits, dtype=torch.bool) for bits in ([0, 1, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1])]
    part.combine([sent(i, pack_bits(mask)) for i, mask in enumerate(masks)], view)  # type: ignore[arg-type]
    found = masks_of(part, spec)
    assert [found[str(i)].int().tolist() for i in range(3)] == [[0, 1, 0, 0], [0, 0, 0, 0], [1, 1, 0, 0]]
    assert part.notes() == []


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return write_files(tmp_path_factory.mktemp("toy"))


@pytest.mark.parametrize("model", ["mlp", "resnet8"])  # heads of other tasks; buffers
def test_masks_from_server_and_client_are_the_same(model: str, files: dict[str, str], device: torch.device) -> None:
    rows: list[Any] = []
    sizes: list[set[tuple[int, ...]]] = []
    for where in ("server", "client"):
        extra = [f"strategy.collaboration.server.masks={where}", "evaluation.personal=true", "clients_per_round=3"]
        extra.append("client.optimizer.weight_decay=0.001")
        choices = {"strategy/collaboration": "fedcac", "scenario": "task_incremental", "model": model}
        diary = run_toy(configure(choices, files, device, *extra, num_tasks=2))
        # a mask that is sent has bytes
        rows.append([row for row in diary.rows if not row["name"].startswith("bytes_")])
        sizes.append({tuple(mask.shape) for mask in diary.traffic["up", "critical"]})
    assert rows[0] == rows[1]
    assert sizes[0] == set()
    assert len(sizes[1]) == 1


def test_a_whole_run_helps_the_clients(run_experiment: Callable[..., Path]) -> None:
    setting = [
        "scenario=joint",
        "rounds_per_task=6",
        "num_clients=6",
        "evaluation.every=0",
        "checkpoint.every=0",
        "data.partition.alpha=0.1",
        "client.epochs=2",
        "strategy/projection=none",
        "evaluation.personal=true",
    ]
    scores = {}
    for name, chosen in {"fedavg": [], "fedcac": ["strategy.collaboration.server.beta=4"]}.items():
        folder = run_experiment(name, *setting, f"strategy/collaboration={name}", *chosen)
        scores[name] = json.loads((folder / "summary.json").read_text())["personal/accuracy_mean"]
    assert scores["fedcac"] > scores["fedavg"] + 0.05
