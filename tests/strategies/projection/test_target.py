"""TARGET: samples that the model is sure of, the same in any process; and distillation on them alone."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from clients.strategies.target import SyntheticDistillation
from fedcl.contracts.learner import Batch, Context, TaskData
from fedcl.models.flat import FlatModel
from fedcl.models.masks import divergence
from fedcl.models.networks import MLP, build_model
from fedcl.scenario.task import Task
from strategies.projection.target import COLUMNS, INPUTS, LOGITS, Synthesis, _moments, synthesise
from tests.toy import configure, run_toy, write_files

HOW = Synthesis(samples=12, iterations=150, batch_size=16, latent=4, hidden=16, lr=0.01, adversarial=0.0, moments=0.1)


def network() -> FlatModel:
    return FlatModel(build_model(lambda: MLP(input_shape=(5,), heads=(4,), hidden=(8,)), seed=3))


def test_disagreement_by_hand() -> None:
    teacher, student = torch.tensor([[0.0, math.log(3.0), 9.0]]), torch.tensor([[0.0, 0.0, 0.0]])
    columns = torch.tensor([[True, True, False]])
    expected = 0.25 * math.log(0.25 / 0.5) + 0.75 * math.log(0.75 / 0.5)
    assert float(divergence(teacher, student, columns)) == pytest.approx(expected)
    assert float(divergence(teacher, teacher, columns)) == 0.0


# mean 2 and standard deviation 1; mean 0 and standard deviation 3; normalised
@pytest.mark.parametrize(("x", "distance"), [([1.0, 2.0, 3.0], 4.0), ([-3.0, 0.0, 3.0], 4.0), ([-1.0, 0.0, 1.0], 0.0)])
def test_moments_are_held_against_normalised_inputs(x: list[float], distance: float) -> None:
    assert float(_moments(torch.tensor(x))) == pytest.approx(distance)


def test_samples_are_what_the_teacher_takes_them_for(device: torch.device) -> None:
    model = network()
    groups = [[0, 2], [1, 3]]
    made = synthesise(model, (5,), model.vector(), model.vector() * 0, groups, HOW, seed=1)
    assert made[INPUTS].shape == (12, 5)
    torch.testing.assert_close(model(made[INPUTS]).logits.detach(), made[LOGITS])
    # columns take turns, each among those of its own head
    assert made[COLUMNS][:2].tolist() == [[1, 0, 1, 0], [1, 0, 1, 0]]
    assert made[COLUMNS][2].tolist() == [0, 1, 0, 1]
    asked = torch.tensor([0, 2, 1, 3]).repeat(3)
    said = made[LOGITS].masked_fill(made[COLUMNS] == 0, -torch.inf).argmax(1)
    assert float((said == asked).double().mean()) >= 0.75
    again = synthesise(model, (5,), model.vector(), model.vector() * 0, groups, HOW, seed=1)
    assert all(torch.equal(made[name], again[name]) for name in made)


def test_samples_are_sought_on_which_teacher_and_student_disagree() -> None:
    model, student = network(), network()
    student.flat.zero_()
    apart = []
    for adversarial in (0.0, 3.0):
        how = replace(HOW, adversarial=adversarial, moments=1.0, iterations=60, samples=64)
        made = synthesise(model, (5,), model.vector(), student.vector(), [[0, 1, 2, 3]], how, seed=1)
        said = student(made[INPUTS]).logits.detach()
        apart.append(float(divergence(made[LOGITS], said, made[COLUMNS].bool())))
    assert apart[1] > 1.3 * apart[0]


def test_distillation_by_hand(device: torch.device) -> None:
    model = FlatModel(MLP(input_shape=(2,), heads=(2,), hidden=()), device=device)
    model.flat.zero_()
    payload = {
        INPUTS: torch.ones(3, 2),
        LOGITS: torch.tensor([[0.0, 2 * math.log(3.0)]] * 3),
        COLUMNS: torch.ones(3, 2, dtype=torch.uint8),
    }
    ctx = Context(
        model=model, task=Task(1, (0, 1), (0, 1)), data=TaskData(torch.zeros(1, 2), torch.zeros(1, dtype=torch.int64)),
        received=model.vector(), epochs=1, batch_size=2, lr=0.1, seed=0, client="0", local_round=0, is_new_task=True,
        task_columns={1: (0, 1)}, num_columns=2, payload=payload,
    )  # fmt: skip
    batch = Batch(ctx.data.x, ctx.data.y, None)
    plugin = SyntheticDistillation(weight=0.5, temperature=2.0)
    loss = plugin.loss(ctx, batch, model(batch.x))
    assert loss is not None
    expected = 0.25 * math.log(0.25 / 0.5) + 0.75 * math.log(0.75 / 0.5)
    assert float(loss.detach()) == pytest.approx(0.5 * 4 * expected, rel=1e-5)
    ctx.payload = {}
    assert plugin.loss(ctx, batch, model(batch.x)) is None


def test_weight_zero_is_fine_tuning_bit_for_bit(tmp_path: Path, device: torch.device) -> None:
    files = write_files(tmp_path)
    small = ["strategy.projection.server.iterations=5", "strategy.projection.server.samples=8", "engine=loop"]
    naive = run_toy(configure({}, files, device, "engine=loop"))
    off = run_toy(
        configure({"strategy/projection": "target"}, files, device, *small, "strategy.projection.client.weight=0")
    )
    on = run_toy(configure({"strategy/projection": "target"}, files, device, *small))
    assert naive.hashes == off.hashes
    assert naive.hashes[:2] == on.hashes[:2]  # nothing is sent before the first task has ended
    assert naive.hashes[2] != on.hashes[2]
