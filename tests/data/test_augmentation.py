"""Augmentation by hand: crops at known offsets, mirror images, squares, and when training uses them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fedcl.client.buffer import ReplayBuffer
from fedcl.client.engines import stacks
from fedcl.client.loop import fit
from fedcl.config.compose import ConfigError
from fedcl.contracts.learner import Batch, Context, LocalTraining, Plugin, TaskData
from fedcl.data.augmentation import Views, crop, cut_out, mirror
from fedcl.models.flat import FlatModel
from fedcl.models.networks import MLP, build_model
from fedcl.scenario.task import Task

# 3x3, row by row: 1 2 3 / 4 5 6 / 7 8 9
NINE = torch.arange(1.0, 10.0).view(1, 1, 3, 3)


def test_a_crop_starts_at_its_offsets_in_the_padded_image() -> None:
    x = torch.cat([NINE, NINE, NINE])
    out = crop(x, torch.tensor([1, 0, 2]), torch.tensor([1, 0, 1]), 1)
    assert torch.equal(out[0], NINE[0])  # the padding's own offset: nothing moves
    # one row up and one column to the left: padding enters there
    assert out[1, 0].tolist() == [[0, 0, 0], [0, 1, 2], [0, 4, 5]]
    assert out[2, 0].tolist() == [[4, 5, 6], [7, 8, 9], [0, 0, 0]]


def test_channels_move_together() -> None:
    x = torch.cat([NINE, 10 * NINE], 1)
    out = crop(x, torch.tensor([0]), torch.tensor([2]), 1)
    assert out[0, 0].tolist() == [[0, 0, 0], [2, 3, 0], [5, 6, 0]]
    assert torch.equal(out[0, 1], 10 * out[0, 0])


def test_only_the_chosen_samples_are_mirrored() -> None:
    out = mirror(torch.cat([NINE, NINE]), torch.tensor([False, True]))
    assert torch.equal(out[0], NINE[0])
    assert out[1, 0].tolist() == [[3, 2, 1], [6, 5, 4], [9, 8, 7]]


def test_a_square_is_cut_out_around_its_middle_and_at_the_border_only_what_lies_inside() -> None:
    x = torch.ones(3, 2, 6, 5)
    out = cut_out(x, torch.tensor([2, 0, 5]), torch.tensor([2, 0, 4]), 4)
    lost = (1 - out).sum((2, 3))
    # rows 0..3 x columns 0..3; rows 0..1 x columns 0..1; rows 3..5 x columns 2..4
    assert lost.tolist() == [[16, 16], [4, 4], [9, 9]]
    assert out[2, 0].nonzero().tolist() == [[r, c] for r in range(6) for c in range(5) if r < 3 or c < 2]


def test_draws_are_the_generators_and_each_sample_has_its_own() -> None:
    x, views = NINE.expand(64, 1, 3, 3), Views(padding=1, flip=0.5, cutout=1)
    first, again, other = (views(x, torch.Generator().manual_seed(seed)) for seed in (5, 5, 6))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert len(first.flatten(1).unique(dim=0)) > 32
    assert torch.equal(x, NINE.expand(64, 1, 3, 3))
    assert torch.equal(Views(flip=1.0)(x, torch.Generator()), x.flip(3))


class Watch(Plugin):
    """Keep what each step is given."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def before_step(self, ctx: Context, batch: Batch) -> Batch:
        self.seen.append(batch.x.clone())
        return batch


def context(local_round: int = 0, augment: bool = True) -> Context:
    flat = FlatModel(build_model(lambda: MLP(input_shape=(1, 3, 3), heads=(2,), hidden=()), seed=1))
    return Context(
        model=flat, task=Task(0, (0, 1), (0, 1)), data=TaskData(NINE.repeat(6, 1, 1, 1), torch.arange(6) % 2),
        received=flat.vector(), epochs=1, batch_size=6, lr=0.01, seed=0, client="0", local_round=local_round,
        is_new_task=True, task_columns={0: (0, 1)}, num_columns=2, augmentation=Views(padding=1) if augment else None,
    )  # fmt: skip


def test_steps_are_augmented_before_the_hooks_and_the_samples_stay_raw() -> None:
    training = LocalTraining(epochs=2, batch_size=6, lr=0.01)
    seen = []
    for local_round in (0, 0, 1):
        watch, ctx = Watch(), context(local_round)
        fit(ctx, [watch], training)
        assert torch.equal(ctx.data.x, NINE.repeat(6, 1, 1, 1))
        seen.append(watch.seen)
    assert all(torch.equal(a, b) for a, b in zip(seen[0], seen[1], strict=True))
    assert not torch.equal(seen[0][0], seen[0][1])  # other views in each epoch
    assert not torch.equal(seen[0][0], seen[2][0])  # and in each local round
    draws = torch.randint(3, (2, 6), generator=context().rng("augment"))
    assert torch.equal(seen[0][0], crop(NINE.repeat(6, 1, 1, 1), draws[0], draws[1], 1))


def test_a_buffer_holds_raw_samples_and_a_step_draws_views_of_them() -> None:
    ctx, buffer = context(), ReplayBuffer(6)
    batch = Batch(ctx.augment(ctx.data.x), ctx.data.y, None)
    ctx.order = torch.arange(6)
    buffer.offer(ctx, batch)
    assert torch.equal(buffer.held["x"], ctx.data.x)
    drawn = buffer.draw(ctx, 6).x
    assert not torch.equal(drawn, ctx.data.x)
    plain = context(augment=False)
    assert torch.equal(buffer.draw(plain, 6).x, ctx.data.x)


def test_stacked_clients_are_handed_to_the_loop() -> None:
    model, training = context().model, LocalTraining()
    assert stacks("stack", model, [], training) is None
    why = stacks("stack", model, [], replace(training, augment=Views(flip=0.5)))
    assert why == "data.augment changes the samples of every step"


SMALL = ["num_clients=3", "rounds_per_task=1", "scenario.num_tasks=2", "learner=er"]
AUGMENTED = ["data/augment=cifar", "data.augment.padding=1", "data.augment.cutout=2"]


def metrics(run_dir: Path) -> bytes:
    return (run_dir / "metrics.parquet").read_bytes()


def test_engines_agree_and_the_choice_changes_training(run_experiment: Callable[..., Path]) -> None:
    plain = [override for override in SMALL if override != "learner=er"]
    stacked, fused = (metrics(run_experiment(e, *plain, *AUGMENTED, f"engine={e}")) for e in ("stack", "fused"))
    assert stacked == fused
    assert metrics(run_experiment("none", *plain, "engine=fused")) != fused


@pytest.mark.ray
@pytest.mark.slow
def test_ray_gives_the_bits_of_inline(run_experiment: Callable[..., Path]) -> None:
    ray = run_experiment("ray", *SMALL, *AUGMENTED, "backend=ray", "backend.workers=2")
    assert metrics(ray) == metrics(run_experiment("inline", *SMALL, *AUGMENTED))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data/augment=flip", "data=text", "model=char_transformer"], "needs images"),
        (["data/augment=cutout"], r"data.augment.cutout=16: must be at most 8 for images of \(1, 8, 8\)"),
        (["data/augment=cifar", "data.augment.padding=8"], "data.augment.padding=8: must be at most 7"),
    ],
)
def test_what_does_not_fit_the_samples_is_refused(
    overrides: list[str],
    message: str,
    tmp_path: Path,
    run_experiment: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "play.txt").write_text(
        "".join(f"{n}:\nto be or not to be\nhere\n\n" for n in ("ANN", "BOB", "CAT", "DAN"))
    )
    if "data=text" in overrides:
        overrides = [*overrides, f"data.root={tmp_path / 'play.txt'}", "data.source.window=4", "num_clients=2"]
    with pytest.raises(ConfigError, match=message):
        run_experiment("refused", *overrides)
    assert not (tmp_path / "refused").exists()
