from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fedcl.base.randomness import torch_generator
from fedcl.contracts.learner import LocalTraining
from strategies.staleness.inversion import Simulation, batch_plan, largest, trainable
from strategies.staleness.search import Search
from tests.strategies.late import (
    BATCHES,
    EACH,
    FULL,
    MOMENTUM,
    STREAM,
    View,
    dataset,
    network,
    part,
    relative,
    train,
    update,
)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.mark.parametrize("training", [FULL, MOMENTUM, BATCHES], ids=["full batch", "momentum and decay", "batches"])
def test_the_simulation_is_the_clients_own_training(training: LocalTraining) -> None:
    base, data = network().vector(), dataset().train
    x, y = torch.from_numpy(data.x[:EACH]), torch.from_numpy(data.y[:EACH])
    # the client's own order of samples, as fedcl.client.loop.fit draws it
    order = torch_generator(0, "a", 0, "batches")
    plan = tuple(
        rows
        for _ in range(training.epochs)
        for rows in torch.randperm(EACH, generator=order).split(training.batch_size)
    )
    mask = STREAM.train_task(0).mask
    columns = None if mask is None else torch.tensor(mask)
    sure = 60.0 * F.one_hot(y, 4).float()  # softmax of it is one-hot to the last bit that counts
    model = network()
    simulation = Simulation(model.module, model.spec, trainable(model), training, columns)
    visit = (base[None], x[None], sure[None], [rows[None] for rows in plan])
    told = simulation.changes(*visit)[0]
    true = train("a", base, training) - base
    assert relative(told, true) < 1e-5
    assert torch.equal(told, simulation.changes(*visit, differentiable=True)[0].detach())


def test_only_the_largest_entries_are_matched() -> None:
    change = torch.tensor([0.1, -5.0, 3.0, 9.0, -0.2])
    allowed = torch.tensor([True, True, True, False, True])
    assert largest(change, allowed, 0.5).tolist() == [False, True, True, False, False]
    assert largest(change, allowed, 0.01).tolist() == [False, True, False, False, False]
    assert largest(change, allowed, 1.0).tolist() == allowed.tolist()
    inversion = part(top=0.3, iterations=100, max_residual=2.0)
    inversion.admit([update(network().vector(), 3)], View(network().vector()))
    assert inversion.metrics()["inverted"] == 1


def test_batches_are_the_clients_in_number_and_in_proportion() -> None:
    def sizes(rows: int, num_examples: int) -> list[int]:
        training = LocalTraining(epochs=2, batch_size=20)
        plan = batch_plan(rows, num_examples, training, torch_generator("plan"))
        assert sorted(torch.cat(plan).tolist()) == sorted([*range(rows), *range(rows)])
        return [len(step) for step in plan]

    assert sizes(50, 50) == [20, 20, 10] * 2
    assert sizes(10, 50) == [4, 4, 2] * 2
    assert sizes(10, 41) == [5, 4, 1] * 2
    assert sizes(3, 50) == [1, 1, 1] * 2
    assert sizes(7, 20) == [7, 7]
    with pytest.raises(ValueError, match="samples=2: must be at least the 3 batches"):
        sizes(2, 50)


def test_the_published_search() -> None:
    search = Search(iterations=80, lr=1.0, variant="official")
    assert [search.lr_at(step) for step in (0, 29, 30, 50, 70)] == pytest.approx([1, 1, 0.1, 0.01, 0.001])
    base = network().vector()
    inversion = part(variant="official", lr=1.0, iterations=60, max_residual=10.0)
    inversion.admit([update(base, 3)], View(base))
    x = inversion.state_dict()["clients"]["a"]["x"]
    assert 1.0 < float(x.abs().max()) <= 2.0  # the last samples count, and they are in the box
    # nothing is refused, and the next search begins again
    settings = {"variant": "official", "lr": 1.0, "iterations": 2, "max_residual": 1e-9, "uniqueness": 2.0}
    published = part(**settings)
    late, view = update(base, 3), View(base)
    first = published.admit([late, update(base, 0, client="b")], view)[0]
    assert torch.equal(published.admit([late], view)[0].model, first.model)
    assert published.metrics()["inverted"] == 2
    assert inversion.metrics()["inverted"] == 1
