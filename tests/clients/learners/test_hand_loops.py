"""Learners beside loops written by hand: torch's own modules, torch's own SGD, the equations of the papers.

Nothing of fedcl is used here but the data, the tasks, the weights to start from, and the order in which samples are
drawn. All samples are one client's, so what a task ends with is what it trained.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div, log_softmax

from clients.learners.der import DER
from clients.learners.er import ER
from clients.learners.ewc import EWC
from clients.learners.gpm import GPM
from clients.learners.lwf import LwF
from clients.learners.mas import MAS
from clients.learners.si import SI
from fedcl.base.randomness import torch_generator
from fedcl.client.local_data import PartitionedData
from fedcl.contracts.learner import Plugin
from fedcl.data.dataset import Dataset
from fedcl.data.sources import digits
from fedcl.scenario.streams import ClassIncremental
from fedcl.scenario.task import Task

TASKS, EPOCHS, BATCH, LR, HIDDEN = 3, 2, 20, 0.1, 24
SCRIPT = [(kind, task) for task in range(TASKS) for kind in ("train", "task_end")]


class Hand:
    """A network as one would write it, and the tasks' samples in the order of the client's visits."""

    def __init__(self, data: PartitionedData, tasks: Sequence[Task], start: Tensor) -> None:
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 10))
        nn.utils.vector_to_parameters(start, self.net.parameters())
        self.samples = [data.train("0", task, torch.device("cpu")) for task in tasks]
        self.seen = [sorted({c for task in tasks[: k + 1] for c in task.columns}) for k in range(len(tasks))]
        self.sgd = torch.optim.SGD(self.net.parameters(), LR)

    def draws(self, task: int, purpose: str) -> torch.Generator:
        """The generator of the client's train visit to a task: every second visit of the script."""
        return torch_generator(0, "0", 2 * task, purpose)

    def batches(self, task: int) -> Iterator[tuple[int, Tensor, Tensor]]:
        x, y, order = self.samples[task].x, self.samples[task].y, self.draws(task, "batches")
        for epoch in range(EPOCHS):
            shuffled = torch.randperm(len(y), generator=order)
            for start in range(0, len(y), BATCH):
                rows = shuffled[start : start + BATCH]
                yield epoch, x[rows], y[rows]

    def entropy(self, task: int, x: Tensor, y: Tensor) -> Tensor:
        """Cross-entropy over the classes seen, as the stream masks them."""
        return self.chosen(task, self.net(x), y)

    def chosen(self, task: int, logits: Tensor, y: Tensor) -> Tensor:
        unseen = [c for c in range(10) if c not in self.seen[task]]
        logits = logits.clone()
        logits[:, unseen] = float("-inf")
        return cross_entropy(logits, y)

    def step(self, loss: Tensor) -> None:
        self.sgd.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self.sgd.step()

    def params(self) -> list[nn.Parameter]:
        return list(self.net.parameters())

    def copies(self) -> list[Tensor]:
        return [p.detach().clone() for p in self.params()]

    def vector(self) -> Tensor:
        return torch.cat([p.detach().flatten() for p in self.params()])


def naive(hand: Hand) -> None:
    for task in range(TASKS):
        for _, x, y in hand.batches(task):
            hand.step(hand.entropy(task, x, y))


def ewc(hand: Hand, weight: float) -> None:
    """Avalanche's convention: a penalty for each past task, no 1/2, F the mean of squared gradients of batch means."""
    past: list[tuple[list[Tensor], list[Tensor]]] = []
    for task in range(TASKS):
        for _, x, y in hand.batches(task):
            loss = hand.entropy(task, x, y)
            for fisher, anchor in past:
                pulls = zip(fisher, hand.params(), anchor, strict=True)
                loss = loss + weight * sum((f * (p - a) ** 2).sum() for f, p, a in pulls)
            hand.step(loss)
        fisher = [torch.zeros_like(p) for p in hand.params()]
        parts = list(zip(hand.samples[task].x.split(BATCH), hand.samples[task].y.split(BATCH), strict=True))
        for x, y in parts:
            grads = torch.autograd.grad(hand.entropy(task, x, y), hand.params())
            fisher = [f + g**2 / len(parts) for f, g in zip(fisher, grads, strict=True)]
        past.append((fisher, hand.copies()))


def lwf(hand: Hand, weight: float, temperature: float) -> None:
    """Avalanche's convention: no T^2, over the classes seen before, mean over the batch."""
    teacher: nn.Module | None = None
    for task in range(TASKS):
        for _, x, y in hand.batches(task):
            logits = hand.net(x)
            loss = hand.chosen(task, logits, y)
            if teacher is not None:
                old = hand.seen[task - 1]
                with torch.no_grad():
                    target = log_softmax(teacher(x)[:, old] / temperature, dim=1)
                student = log_softmax(logits[:, old] / temperature, dim=1)
                loss = loss + weight * kl_div(student, target, reduction="batchmean", log_target=True)
            hand.step(loss)
        teacher = deepcopy(hand.net)


class Slots:
    """Algorithm R, one sample at a time; rows are tuples."""

    def __init__(self, budget: int) -> None:
        self.budget, self.seen = budget, 0
        self.rows: list[tuple[Any, ...]] = []

    def see(self, rows: Sequence[tuple[Any, ...]], draws: torch.Generator) -> None:
        late = max(0, min(len(rows), self.seen + len(rows) - max(self.budget, self.seen)))
        uniform = iter(torch.rand(late, generator=draws, dtype=torch.float64).tolist())
        for row in rows:
            if len(self.rows) < self.budget:
                self.rows.append(row)
            elif (slot := int(next(uniform) * (self.seen + 1))) < self.budget:
                self.rows[slot] = row
            self.seen += 1

    def draw(self, draws: torch.Generator) -> list[tuple[Any, ...]]:
        return [self.rows[k] for k in torch.randperm(len(self.rows), generator=draws)[:BATCH].tolist()]


def er(hand: Hand, budget: int) -> None:
    memory = Slots(budget)
    for task in range(TASKS):
        replay, reservoir = hand.draws(task, "replay"), hand.draws(task, "reservoir")
        for epoch, x, y in hand.batches(task):
            old = memory.draw(replay) if memory.rows else []
            both_x = torch.cat([x, *(row[0][None] for row in old)])
            both_y = torch.cat([y, *(row[1][None] for row in old)])
            if epoch == 0:
                memory.see(list(zip(x, y, strict=True)), reservoir)
            hand.step(hand.entropy(task, both_x, both_y))


def derpp(hand: Hand, budget: int, alpha: float, beta: float) -> None:
    """The paper's rule: the logits that a sample had when it came by."""
    memory = Slots(budget)
    for task in range(TASKS):
        replay, reservoir = hand.draws(task, "replay"), hand.draws(task, "reservoir")
        for epoch, x, y in hand.batches(task):
            logits = hand.net(x)
            loss = hand.chosen(task, logits, y)
            if memory.rows:
                past = memory.draw(replay)
                distance = hand.net(torch.stack([row[0] for row in past])) - torch.stack([row[2] for row in past])
                loss = loss + alpha * (distance**2).mean()
                past = memory.draw(replay)
                labels = torch.stack([row[1] for row in past])
                loss = loss + beta * hand.entropy(task, torch.stack([row[0] for row in past]), labels)
            if epoch == 0:
                memory.see(list(zip(x, y, logits.detach(), strict=True)), reservoir)
            hand.step(loss)


def si(hand: Hand, c: float, xi: float) -> None:
    importance, anchor = [torch.zeros_like(p) for p in hand.params()], hand.copies()
    for task in range(TASKS):
        omega, start = [torch.zeros_like(p) for p in hand.params()], hand.copies()
        for _, x, y in hand.batches(task):
            loss, before = hand.entropy(task, x, y), hand.copies()
            own = torch.autograd.grad(loss, hand.params(), retain_graph=True)
            if task:
                pulls = zip(importance, hand.params(), anchor, strict=True)
                loss = loss + c * sum((f * (p - a) ** 2).sum() for f, p, a in pulls)
            hand.step(loss)
            for o, g, p, b in zip(omega, own, hand.copies(), before, strict=True):
                o -= g * (p - b)
        anchor = hand.copies()
        for f, o, end, s in zip(importance, omega, anchor, start, strict=True):
            f += o.clamp_min(0) / ((end - s) ** 2 + xi)


def mas(hand: Hand, weight: float) -> None:
    importance, anchor = [torch.zeros_like(p) for p in hand.params()], hand.copies()
    for task in range(TASKS):
        for _, x, y in hand.batches(task):
            loss = hand.entropy(task, x, y)
            if task:
                pulls = zip(importance, hand.params(), anchor, strict=True)
                loss = loss + weight * sum((f * (p - a) ** 2).sum() for f, p, a in pulls)
            hand.step(loss)
        own = [c for c in hand.seen[task] if not task or c not in hand.seen[task - 1]]
        for x in hand.samples[task].x:
            grads = torch.autograd.grad((hand.net(x[None])[:, own] ** 2).sum(), hand.params())
            importance = [f + g.abs() / len(hand.samples[task].x) for f, g in zip(importance, grads, strict=True)]
        anchor = hand.copies()


def gpm(hand: Hand, epsilon: float) -> None:
    """By the samples' own SVD (eq. 8, 9); a bias is the weight of an input that is always 1."""
    bases = [torch.zeros(65, 0, dtype=torch.float64), torch.zeros(HIDDEN + 1, 0, dtype=torch.float64)]
    layers = [hand.net[1], hand.net[3]]
    for task in range(TASKS):
        for _, x, y in hand.batches(task):
            hand.sgd.zero_grad()
            hand.entropy(task, x, y).backward()  # type: ignore[no-untyped-call]
            for layer, basis in zip(layers, bases, strict=True):
                whole = torch.cat([layer.weight.grad, layer.bias.grad[:, None]], 1).double()  # type: ignore[union-attr, list-item, index]
                whole -= whole @ basis @ basis.T
                layer.weight.grad, layer.bias.grad = whole[:, :-1].float(), whole[:, -1].float()
            hand.sgd.step()
        x = hand.samples[task].x.flatten(1)
        with torch.no_grad():
            inputs = [x, hand.net[1:3](x)]
        for k, rows in enumerate(inputs):
            matrix = torch.cat([rows, torch.ones(len(rows), 1)], 1).double().T
            inside = bases[k] @ bases[k].T @ matrix
            directions, values, _ = torch.linalg.svd(matrix - inside, full_matrices=False)
            held = (inside**2).sum() + torch.cat([torch.zeros(1), (values**2).cumsum(0)])
            needed = int((held < epsilon * (matrix**2).sum()).sum())
            bases[k] = torch.linalg.qr(torch.cat([bases[k], directions[:, :needed]], 1))[0]


PAIRS: dict[str, tuple[Callable[[], Plugin] | None, Callable[[Hand], None], float]] = {
    "naive": (None, naive, 0.0),
    "ewc": (
        partial(EWC, weight=1.0, mode="separate", fisher="per_batch", half=False),
        partial(ewc, weight=1.0),
        1e-6,
    ),
    "lwf": (
        partial(LwF, weight=1.0, temperature=2.0, t_squared=False),
        partial(lwf, weight=1.0, temperature=2.0),
        1e-6,
    ),
    "er": (partial(ER, budget=60), partial(er, budget=60), 1e-6),
    "derpp": (
        partial(DER, budget=60, alpha=0.3, beta=0.5, refresh=False),
        partial(derpp, budget=60, alpha=0.3, beta=0.5),
        1e-6,
    ),
    "si": (partial(SI, weight=0.5, damping=0.1), partial(si, c=0.5, xi=0.1), 1e-6),
    "mas": (partial(MAS, weight=0.5), partial(mas, weight=0.5), 1e-6),
    "gpm": (partial(GPM, epsilon=0.9, increment=0.0), partial(gpm, epsilon=0.9), 1e-6),
}


@pytest.fixture(scope="module")
def handwritten() -> Dataset:
    return digits()


@pytest.mark.parametrize("name", PAIRS)
def test_a_learner_is_its_equations(handwritten: Dataset, make_client: Callable[..., Any], name: str) -> None:
    build, loop, tolerance = PAIRS[name]
    stream = ClassIncremental(num_classes=10, input_shape=(1, 8, 8), seed=0, num_tasks=5)
    settings = {"epochs": EPOCHS, "batch_size": BATCH, "lr": LR, "momentum": 0.0, "hidden": (HIDDEN,)}
    ends = {}
    for learner, plugins in ((name, {} if build is None else {name: build}), ("naive", {})):
        client = make_client(handwritten, stream, plugins, **settings)
        if client.runtime.model.device.type != "cpu":
            pytest.skip("compares with a loop on the CPU")
        start = client.runtime.model.vector()
        ends[learner] = list(client.run(SCRIPT))[-1]
    tasks = [stream.train_task(k) for k in range(TASKS)]
    hand = Hand(client.runtime.data, tasks, start)
    loop(hand)
    difference = (ends[name] - hand.vector()).abs().max().item()
    assert difference <= tolerance
    if name != "naive":  # or the comparison would say nothing about the learner
        assert (ends[name] - ends["naive"]).abs().max() > 1e-3
