from __future__ import annotations

import pytest
import torch

from clients.learners.er import ER, masks_by_task
from fedcl.client.plugin import Batch, Context, TaskData
from fedcl.models.flat import FlatModel
from fedcl.models.networks import MLP
from fedcl.scenario.task import Task


def context(
    device: torch.device,
    task: Task,
    met: dict[int, tuple[int, ...]],
    *,
    visit: int = 0,
    is_new: bool = True,
    values: range = range(12),
) -> Context:
    x = torch.tensor([[float(value)] for value in values], device=device)
    return Context(
        model=FlatModel(MLP(input_shape=(1,), heads=(4,), hidden=()), device=device), task=task,
        data=TaskData(x, torch.full((len(x),), task.columns[0], device=device)), received=torch.zeros(8), epochs=2,
        batch_size=3, lr=0.1, seed=0, client="0", visit=visit, is_new_task=is_new, task_columns=met, num_columns=4,
    )  # fmt: skip


def steps(er: ER, ctx: Context) -> list[Batch]:
    """Play the visit's batches in order."""
    er.before_round(ctx)
    batches = []
    for epoch in range(ctx.epochs):
        ctx.epoch = epoch
        for start in range(0, len(ctx.data), ctx.batch_size):
            part = slice(start, start + ctx.batch_size)
            batches.append(er.before_step(ctx, Batch(ctx.data.x[part], ctx.data.y[part], ctx.mask)))
    return batches


TASK = [Task(0, (0, 1), (0, 1), mask=(0, 1)), Task(1, (2, 3), (2, 3), mask=(2, 3))]
SEEN = Task(1, (2, 3), (2, 3), mask=(0, 1, 2, 3))
MET = {0: (0, 1), 1: (2, 3)}


def test_each_sample_of_the_stream_is_offered_once(device: torch.device) -> None:
    er = ER(budget=100)
    steps(er, context(device, TASK[0], {0: (0, 1)}))
    assert er.state()["seen"] == 12
    steps(er, context(device, TASK[0], {0: (0, 1)}, visit=1, is_new=False))
    assert er.state()["seen"] == 12
    steps(er, context(device, TASK[1], MET, visit=2, values=range(20, 27)))
    state = er.state()
    assert state["seen"] == 19
    assert sorted(state["x"].flatten().tolist()) == [*range(12), *range(20, 27)]
    assert state["task"].tolist() == [0] * 12 + [1] * 7
    assert state["y"].tolist() == [0] * 12 + [2] * 7


def test_replay_comes_from_before_the_batch(device: torch.device) -> None:
    er = ER(budget=100, replay_size=4)
    batches = steps(er, context(device, TASK[0], {0: (0, 1)}))
    assert [len(batch.y) for batch in batches] == [3, 6, 7, 7, 7, 7, 7, 7]
    for step, batch in enumerate(batches[:4]):
        new, old = batch.x.flatten().tolist()[:3], batch.x.flatten().tolist()[3:]
        assert new == [3 * step, 3 * step + 1, 3 * step + 2]
        assert set(old) <= set(range(3 * step))
        assert len(set(old)) == len(old)


def test_without_a_size_as_many_are_replayed_as_come_in(device: torch.device) -> None:
    batches = steps(ER(budget=100), context(device, TASK[0], {0: (0, 1)}))
    assert [len(batch.y) for batch in batches[:3]] == [3, 6, 6]


def test_replayed_samples_of_other_tasks_choose_among_their_own_columns(device: torch.device) -> None:
    er = ER(budget=100)
    first = steps(er, context(device, TASK[0], {0: (0, 1)}))
    assert all(batch.mask is not None and batch.mask.ndim == 1 for batch in first)  # one mask serves all
    for batch in steps(er, context(device, TASK[1], MET, visit=1)):
        assert batch.mask is not None
        assert batch.mask.shape == (len(batch.y), 4)
        assert batch.mask.gather(1, batch.y[:, None]).all()
        for y, row in zip(batch.y.tolist(), batch.mask.tolist(), strict=True):
            assert row == ([True, True, False, False] if y < 2 else [False, False, True, True])


@pytest.mark.parametrize(
    "task", [SEEN, Task(1, (2, 3), (2, 3)), Task(1, (2, 3), (2, 3), mask=(1, 2, 3))], ids=["seen", "all", "partly"]
)
def test_masks_of_earlier_tasks(device: torch.device, task: Task) -> None:
    ctx = context(device, task, MET)
    masks = masks_by_task(ctx)
    if task.mask != (1, 2, 3):
        assert masks is None
    else:
        assert masks is not None
        assert masks.tolist() == [[True, True, False, False], [False, True, True, True]]


def test_with_a_growing_mask_replay_shares_it(device: torch.device) -> None:
    er = ER(budget=100)
    steps(er, context(device, TASK[0], {0: (0, 1)}))
    narrow = Task(1, (2,), (2,), mask=(0, 1, 2))
    for batch in steps(er, context(device, narrow, {0: (0, 1), 1: (2,)}, visit=1)):
        assert batch.mask is not None
        assert batch.mask.tolist() == [True, True, True, False]


def test_the_draws_belong_to_the_visit(device: torch.device) -> None:
    def replayed(visit: int) -> list[float]:
        batches = steps(ER(budget=6), context(device, TASK[0], {0: (0, 1)}, visit=visit))
        return [value for batch in batches for value in batch.x[3:, 0].tolist()]

    assert replayed(0) == replayed(0)
    assert replayed(0) != replayed(1)
