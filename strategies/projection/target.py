"""TARGET: a generator that needs no data makes samples of earlier tasks, which clients distil from.

Zhang et al., "TARGET: Federated Class-Continual Learning via Exemplar-Free Distillation", ICCV 2023. When a task ends,
the server trains a generator against the global model, synthesises samples of all classes so far, and sends them to
clients with the model's own outputs; ``docs/methods/target.md`` says what differs from the published code.
"""

# P = parameters, N = synthetic samples, B = batch, C = logit columns, Z = latent numbers
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedcl.contracts.learner import Payload
from fedcl.contracts.requests import ErasureOutcome, ForgetRequest
from fedcl.contracts.strategy import GLOBAL, Event, LocalWork, Projection
from fedcl.contracts.strategy import Target as TargetName
from fedcl.contracts.view import ServerView
from fedcl.evaluation.predictions import masked
from fedcl.models.flat import FlatModel
from fedcl.models.masks import divergence

INPUTS, LOGITS, COLUMNS = "target_inputs", "target_logits", "target_columns"


@dataclass(frozen=True)
class Synthesis:
    """How samples are made: sizes, Adam's steps and learning rate, and the weights of the loss.

    ``adversarial`` weighs the disagreement between teacher and student that the generator seeks, ``moments`` the
    distance of a batch's mean and standard deviation from those of normalised inputs, 0 and 1.
    """

    samples: int
    iterations: int
    batch_size: int
    latent: int
    hidden: int
    lr: float
    adversarial: float
    moments: float


class Generator(nn.Module):
    """Two linear layers from latent numbers and a one-hot column to a sample."""

    def __init__(self, latent: int, columns: int, hidden: int, shape: Sequence[int]) -> None:
        super().__init__()
        self.body = nn.Linear(latent + columns, hidden)
        self.head = nn.Linear(hidden, prod(shape))
        self.shape, self.columns = tuple(shape), columns

    def forward(self, z_BZ: Tensor, y_B: Tensor) -> Tensor:
        """Return samples (B, ...) of the columns y (B,)."""
        joined = torch.cat([z_BZ, F.one_hot(y_B, self.columns).to(z_BZ)], dim=1)
        flat: Tensor = self.head(F.leaky_relu(self.body(joined), 0.2))
        return flat.view(-1, *self.shape)


def synthesise(
    model: FlatModel,
    shape: tuple[int, ...],
    teacher_P: Tensor,
    student_P: Tensor,
    groups: Sequence[Sequence[int]],
    how: Synthesis,
    seed: int,
) -> dict[str, Tensor]:
    """Return samples (N, ...), the teacher's logits on them (N, C), and which columns each is about, uint8 (N, C).

    Every column of ``groups``, each of which is one softmax, gets the same number of samples, as far as N allows. Pure:
    ``model`` gives the architecture, and ``seed`` every draw.
    """
    draw = torch.Generator().manual_seed(seed)
    teacher, student = model.copy(), model.copy()
    for network, weights_P in ((teacher, teacher_P), (student, student_P)):
        network.load(weights_P)
        network.eval()
    width = teacher(torch.zeros(1, *shape, device=model.device)).logits.shape[1]
    columns, about = torch.tensor([column for group in groups for column in group]), _competing(groups, width)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        generator = Generator(how.latent, width, how.hidden, shape).to(model.device)
    optimizer = torch.optim.Adam(generator.parameters(), lr=how.lr)
    learner = torch.optim.SGD(student.trainable, lr=how.lr)

    def made(y_B: Tensor) -> Tensor:
        z = torch.randn(len(y_B), how.latent, generator=draw)
        x: Tensor = generator(z.to(model.device), y_B.to(model.device))
        return x

    for _ in range(how.iterations):
        y = columns[torch.randint(len(columns), (how.batch_size,), generator=draw)]
        mask, target = about[y].to(model.device), y.to(model.device)
        x = made(y)
        said = teacher(x).logits
        loss = F.cross_entropy(masked(said, mask), target) + how.moments * _moments(x)
        loss = loss - how.adversarial * divergence(said, student(x).logits, mask)
        _descend(optimizer, loss)
        _descend(learner, divergence(said.detach(), student(x.detach()).logits, mask))
    with torch.no_grad():
        y = columns[torch.arange(how.samples) % len(columns)]
        x = made(y)
        return {INPUTS: x.cpu(), LOGITS: teacher(x).logits.cpu(), COLUMNS: about[y].to(torch.uint8)}


def _competing(groups: Sequence[Sequence[int]], width: int) -> Tensor:
    """Return the columns that each column competes with, bool (C, C): those of its group."""
    about = torch.zeros(width, width, dtype=torch.bool)
    for group in groups:
        about[torch.tensor(group)[:, None], torch.tensor(group)] = True
    return about


def _descend(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    optimizer.zero_grad()
    torch.autograd.backward(loss)
    optimizer.step()


def _moments(x: Tensor) -> Tensor:
    return x.mean().square() + (x.std() - 1).square()


class TARGET(Projection):
    """Synthesise samples at each task's end and send them along with every later message.

    Parameters
    ----------
    samples, iterations, batch_size, latent, hidden, lr, adversarial, moments
        See `Synthesis`.
    """

    payloads: ClassVar[tuple[Payload, ...]] = tuple(Payload(name, "down") for name in (INPUTS, LOGITS, COLUMNS))

    def __init__(
        self,
        *,
        samples: int = 256,
        iterations: int = 200,
        batch_size: int = 64,
        latent: int = 32,
        hidden: int = 256,
        lr: float = 1e-3,
        adversarial: float = 1.0,
        moments: float = 1.0,
    ) -> None:
        self.how = Synthesis(samples, iterations, batch_size, latent, hidden, lr, adversarial, moments)
        self._work: LocalWork | None = None
        self._student: Tensor | None = None
        self._made: dict[str, Tensor] = {}

    def bind(self, work: LocalWork) -> None:
        """Learn the architecture; the student begins with the run's initial weights."""
        self._work, self._student = work, work.model.vector().cpu()

    def message_for(self, client: str, view: ServerView) -> dict[str, Tensor]:
        return self._made

    def finalize(self, event: Event, view: ServerView) -> dict[TargetName, Tensor]:
        """Make new samples of all columns seen so far, if a task has ended and others follow."""
        if event.kind != "task_end" or event.is_last_task or self._work is None or self._student is None:
            return {}
        groups = self._groups(event.task)
        if not groups:
            return {}
        seed = int(torch.randint(2**62, (1,), generator=view.rng("target")))
        arguments = (self._work.model, self._work.input_shape, view.model_at(GLOBAL), self._student, groups, self.how)
        self._made = view.compute(synthesise, *arguments, seed).result()
        return {}

    def _groups(self, reached: int) -> list[list[int]]:
        """Return the columns of the tasks up to the stage ``reached``: a group a head."""
        assert self._work is not None
        by_head: dict[int, set[int]] = {}
        for task_id in range(reached + 1):
            task = self._work.stream.train_task(task_id)
            by_head.setdefault(task.head, set()).update(task.columns)
        return [sorted(columns) for columns in by_head.values() if columns]

    def state_dict(self) -> dict[str, Any]:
        return {"made": dict(self._made)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._made = dict(state["made"])

    def forget(self, request: ForgetRequest) -> ErasureOutcome:
        """Drop the samples: each is made from a model that all clients trained."""
        self._made = {}
        return ErasureOutcome(type(self).__name__, "reset", "synthetic samples are dropped until the next task ends")

    def metrics(self) -> dict[str, float]:
        """Return how sure the model is of the samples it was asked for: mean probability of the most likely column."""
        if not self._made:
            return {}
        logits = masked(self._made[LOGITS], self._made[COLUMNS] != 0)
        return {"confidence": float(logits.softmax(1).amax(1).mean())}
