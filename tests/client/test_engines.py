"""The engines against the loop: the same training to rounding, the same bits however clients are put together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fedcl.client.engines import stackable, stacks
from fedcl.client.fused import FusedStep
from fedcl.client.loop import fit
from fedcl.client.stacked import fit_stacked
from fedcl.config.value_rules import ConfigError
from fedcl.contracts.learner import Batch, Context, LocalTraining, Plugin, TaskData
from fedcl.models.chain import chain_of
from fedcl.models.flat import FlatModel
from fedcl.models.networks import MLP, LeNet, build_model
from fedcl.scenario.task import Task

PLAIN = LocalTraining(epochs=2, batch_size=16, lr=0.1)
DECAYED = LocalTraining(epochs=2, batch_size=16, lr=0.05, weight_decay=1e-2)
HEAVY = LocalTraining(epochs=3, batch_size=8, lr=0.05, momentum=0.9, weight_decay=1e-3)
# sizes that divide into batches and that do not, one smaller than a batch, and two alike
SIZES = (50, 33, 16, 50, 5)


def mlp(hidden: Sequence[int], heads: Sequence[int] = (10,), dropout: Sequence[float] | None = None) -> FlatModel:
    return FlatModel(build_model(lambda: MLP(input_shape=(12,), heads=heads, hidden=hidden, dropout=dropout), seed=1))


CASES: dict[str, tuple[Callable[[], FlatModel], tuple[int, ...], tuple[int, ...] | None, LocalTraining]] = {
    "linear classifier": (lambda: mlp(()), (12,), None, PLAIN),
    "two hidden layers, momentum": (lambda: mlp((9, 7)), (12,), None, HEAVY),
    "masked columns, weight decay": (lambda: mlp((9,)), (12,), (0, 1, 2), DECAYED),
    "three heads": (lambda: mlp((9,), (3, 3, 4)), (12,), (3, 4, 5), DECAYED),
    "dropout": (lambda: mlp((9, 7), dropout=(0.2, 0.5)), (12,), None, PLAIN),
}


def visits(
    model: FlatModel, shape: tuple[int, ...], columns: tuple[int, ...] | None, training: LocalTraining
) -> list[Context]:
    made = []
    for k, size in enumerate(SIZES):
        generator = torch.Generator().manual_seed(k)
        x = torch.randn(size, *shape, generator=generator)
        y = torch.tensor(columns or range(10))[torch.randint(len(columns or range(10)), (size,), generator=generator)]
        task = Task(0, tuple(range(10)), tuple(range(10)), mask=columns)
        made.append(
            Context(
                model=model, task=task, data=TaskData(x, y), received=model.vector(), epochs=1, batch_size=1,
                lr=training.lr * (1 + k % 2), seed=3, client=str(k), local_round=2, is_new_task=True, task_columns={},
                num_columns=10,
            )
        )  # fmt: skip
    return made


def looped(
    model: FlatModel, ctxs: Sequence[Context], training: LocalTraining, *, fused: bool = False
) -> list[tuple[Tensor, dict[str, float]]]:
    start, results = model.vector(), []
    for ctx in ctxs:
        model.load(start)
        model.set_generator(ctx.rng("dropout"))
        metrics = fit(ctx, [], training, fused=fused)
        results.append((model.vector(), metrics))
    model.load(start)
    return results


def assert_alike(results: Any, references: Any) -> None:
    for (vector, metrics), (expected, wanted) in zip(results, references, strict=True):
        # float32: some thirty steps round differently, each by a few units in the last place
        torch.testing.assert_close(vector, expected, rtol=1e-5, atol=1e-6)
        assert metrics == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_engines_train_alike(name: str) -> None:
    make, shape, columns, training = CASES[name]
    model = make()
    start = model.vector()
    expected = looped(model, visits(model, shape, columns, training), training)
    assert all(float((vector - start).abs().max()) > 1e-3 for vector, _ in expected)
    assert_alike(looped(model, visits(model, shape, columns, training), training, fused=True), expected)
    assert_alike(fit_stacked(visits(model, shape, columns, training), [start] * len(SIZES), training), expected)


def test_a_network_of_convolutions_is_differentiated_for_all_clients_at_once() -> None:
    model = FlatModel(build_model(lambda: LeNet(input_shape=(1, 16, 16), heads=(10,)), seed=1))
    start = model.vector()
    assert chain_of(model.module) is None
    expected = looped(model, visits(model, (1, 16, 16), None, HEAVY), HEAVY)
    assert_alike(fit_stacked(visits(model, (1, 16, 16), None, HEAVY), [start] * len(SIZES), HEAVY), expected)


@pytest.mark.parametrize("name", CASES)
def test_bits_do_not_depend_on_who_is_in_the_stack(name: str) -> None:
    """A worker that dies, a client that leaves, a device alone: the others' numbers stay."""
    make, shape, columns, training = CASES[name]
    model = make()
    start = model.vector()
    whole = [
        vector for vector, _ in fit_stacked(visits(model, shape, columns, training), [start] * len(SIZES), training)
    ]
    for members in ([0], [4], [3, 1], [4, 3, 2, 1, 0]):
        made = visits(model, shape, columns, training)
        part = fit_stacked([made[k] for k in members], [start] * len(members), training)
        assert all(torch.equal(vector, whole[k]) for k, (vector, _) in zip(members, part, strict=True))


def test_each_client_starts_from_its_own_weights() -> None:
    model = mlp((9,))
    starts = [model.vector() * (1 + k) for k in range(len(SIZES))]
    stacked = fit_stacked(visits(model, (12,), None, PLAIN), starts, PLAIN)
    for ctx, start, (vector, _) in zip(visits(model, (12,), None, PLAIN), starts, stacked, strict=True):
        model.load(start)
        fit(ctx, [], PLAIN)
        torch.testing.assert_close(vector, model.vector(), rtol=1e-5, atol=1e-6)


def test_one_fused_step_by_hand() -> None:
    """One sample x = (1, 2), two columns, weights zero: p = (1/2, 1/2), so W moves by lr (1/2)(1, 2) towards y."""
    model = FlatModel(build_model(lambda: MLP(input_shape=(2,), heads=(2,), hidden=()), seed=0))
    model.load(torch.zeros_like(model.flat))
    ctx = visits(model, (2,), None, PLAIN)[0]
    step = FusedStep(ctx, chain_of(model.module) or pytest.fail("no chain"), lr=0.1, momentum=0.0, weight_decay=0.0)
    loss = step(Batch(torch.tensor([[1.0, 2.0]]), torch.tensor([0]), None))
    assert float(loss) == pytest.approx(0.6931472)
    assert model.vector().tolist() == pytest.approx([0.05, 0.1, -0.05, -0.1, 0.05, -0.05])


def by_batch(ctxs: list[Context]) -> list[Context]:
    for ctx in ctxs:
        ctx.task = replace(ctx.task, by_batch=True)
    return ctxs


@pytest.mark.parametrize("name", [*CASES, "convolutions"])
def test_engines_agree_on_the_columns_of_each_batch(name: str) -> None:
    lenet = (lambda: FlatModel(build_model(lambda: LeNet(input_shape=(1, 16, 16), heads=(10,)), seed=1)), (1, 16, 16))
    make, shape, columns, training = (*lenet, None, PLAIN) if name == "convolutions" else CASES[name]
    training = replace(training, batch_size=4)  # so that a batch lacks some of ten classes
    model = make()
    start = model.vector()
    expected = looped(model, by_batch(visits(model, shape, columns, training)), training)
    seen = looped(model, visits(model, shape, columns, training), training)
    assert all(
        float((vector - other).abs().max()) > 1e-3 for (vector, _), (other, _) in zip(expected, seen, strict=True)
    )
    assert_alike(looped(model, by_batch(visits(model, shape, columns, training)), training, fused=True), expected)
    starts = [start] * len(SIZES)
    assert_alike(fit_stacked(by_batch(visits(model, shape, columns, training)), starts, training), expected)


class Penalised(Plugin):
    def loss(self, ctx: Any, batch: Any, out: Any) -> Tensor:
        return out.features.sum()


class Replaying(Plugin):
    def before_step(self, ctx: Any, batch: Batch) -> Batch:
        return Batch(torch.cat([batch.x, batch.x]), torch.cat([batch.y, batch.y]), batch.mask)


def test_what_takes_part_in_steps_is_not_stacked() -> None:
    model = mlp((9,))
    assert stackable(model, []) is None
    assert stackable(model, [Penalised()]) == "Penalised takes part in every step (loss)"
    assert stackable(model, [Replaying()]) == "Replaying takes part in every step (before_step)"
    normed = FlatModel(_Normed())
    assert stackable(normed, []) == "the model keeps running statistics"


def test_fused_steps_take_the_batches_that_plugins_make() -> None:
    model = mlp((9,))
    start = model.vector()
    results = []
    for fused in (False, True):
        model.load(start)
        fit(visits(model, (12,), None, PLAIN)[0], [Replaying()], PLAIN, fused=fused)
        results.append(model.vector())
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-6)


def test_a_term_of_a_plugin_counts_with_every_engine() -> None:
    model = mlp((9,))
    start = model.vector()
    results = []
    for fused in (False, True):
        model.load(start)
        fit(visits(model, (12,), None, PLAIN)[0], [Penalised()], PLAIN, fused=fused)
        results.append(model.vector())
    assert torch.equal(results[0], results[1])


def test_which_networks_are_stacked() -> None:
    lenet = FlatModel(build_model(lambda: LeNet(input_shape=(1, 16, 16), heads=(10,)), seed=1))
    assert stacks("auto", mlp((9,)), [], PLAIN) is None
    assert stacks("auto", lenet, [], PLAIN) == "the model is not a plain linear network"
    assert stacks("stack", lenet, [], PLAIN) is None
    assert stacks("loop", mlp((9,)), [], PLAIN) == "engine=loop"
    frozen = build_model(lambda: MLP(input_shape=(4,), heads=(2,), hidden=(3,), freeze="hidden"), seed=0)
    cosine = build_model(lambda: MLP(input_shape=(4,), heads=(2,), hidden=(3,), head="cosine"), seed=0)
    assert chain_of(frozen) is None
    assert chain_of(cosine) is None


class _Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3)


def test_mixed_precision_is_the_loops(tmp_path: Path, run_experiment: Callable[..., Path]) -> None:
    small = ("num_clients=3", "rounds_per_task=1", "scenario.num_tasks=2", "precision=bfloat16")
    for engine in ("fused", "stack", "tune"):
        with pytest.raises(
            ConfigError, match=f"precision=bfloat16: needs engine=auto or engine=loop, not engine={engine}"
        ):
            run_experiment(engine, *small, f"engine={engine}")
    auto, loop = (run_experiment(engine, *small, f"engine={engine}") for engine in ("auto", "loop"))
    assert (auto / "metrics.parquet").read_bytes() == (loop / "metrics.parquet").read_bytes()
    exact = run_experiment("exact", *small[:-1], "engine=loop")
    assert (exact / "metrics.parquet").read_bytes() != (loop / "metrics.parquet").read_bytes()
