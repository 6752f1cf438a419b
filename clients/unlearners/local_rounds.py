"""Rounds of plain local training that an unlearner runs again: what was trained then, without departing clients."""

# P = length of the flat vector, N = samples, C = logit columns
from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor

from clients.unlearners.steps import as_trained, descend, epochs_of, settings
from fedcl.contracts import fields
from fedcl.contracts.learner import LocalTraining
from fedcl.contracts.unlearner import Local, Samples, UnlearnContext, UnlearnView
from fedcl.models.masks import column_mask

if TYPE_CHECKING:
    from fedcl.contracts.strategy import Update
    from fedcl.scenario.task import Stream

MODEL = "model"


@dataclass(frozen=True)
class LocalTask:
    """What a client trained in a round: a task, and the columns it could choose from (none: all)."""

    task: int
    columns: tuple[int, ...] = ()

    def state(self) -> dict[str, Any]:
        """Return the local task for a checkpoint."""
        return {"task": self.task, "columns": list(self.columns)}

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> LocalTask:
        """Read what :meth:`state` returned."""
        return cls(int(state["task"]), tuple(state["columns"]))


@dataclass
class LocalTasks:
    """Works out what clients train, round by round; it remembers which tasks each has been seen with."""

    stream: Stream | None = None
    _seen: dict[str, list[int]] = field(default_factory=dict)

    def take(self, update: Update) -> LocalTask:
        """Return the local task that ``update`` comes from."""
        seen = self._seen.setdefault(update.client, [])
        if update.task not in seen:
            seen.append(update.task)
        if self.stream is None:
            return LocalTask(update.task)
        mask = self.stream.client_task(update.task, update.client, tuple(seen)).mask
        return LocalTask(update.task, () if mask is None else tuple(mask))

    def drop(self, client: str) -> None:
        """Forget which tasks ``client`` has been seen with."""
        self._seen.pop(client, None)

    def state(self) -> dict[str, list[int]]:
        """Return the tasks by client."""
        return {client: list(tasks) for client, tasks in self._seen.items()}

    def load(self, state: Mapping[str, Sequence[int]]) -> None:
        """Restore what :meth:`state` returned."""
        self._seen = {client: list(tasks) for client, tasks in state.items()}


@dataclass(frozen=True)
class Trained:
    """What came back from a client: how many samples it has of the task, and its change of the model, float64 (P,)."""

    num_examples: int
    change: Tensor


def run_round(
    view: UnlearnView, step: str, model: Tensor, local_tasks: Mapping[str, LocalTask], *, epochs: int, place: int
) -> dict[str, Trained]:
    """Let clients train ``epochs`` epochs from ``model`` (P,), each on its local task; ``place`` keys their draws.

    Clients that no longer hold anything of their task are left out, and so are those that fail.
    """
    groups: dict[LocalTask, list[str]] = {}
    for client, local_task in local_tasks.items():
        groups.setdefault(local_task, []).append(client)
    start = model.float()
    found: dict[str, Trained] = {}
    for local_task, clients in groups.items():
        args = {"task": local_task.task, "columns": list(local_task.columns), "epochs": epochs, "place": place}
        responses = view.ask(step, dict.fromkeys(clients, start), {MODEL: fields.MODEL}, **args)  # type: ignore[arg-type]
        for response in responses:
            change = response.tensors[MODEL].double() - start.double()
            found[response.client] = Trained(response.num_examples, change)
    return {client: found[client] for client in local_tasks if client in found}


def train_local_task(ctx: UnlearnContext) -> Local:
    """Train from the received weights on what the client retains of a task, as ``client.*`` says, and return the model.

    Plain masked cross-entropy: plugins of the learner take no part.
    """
    task, columns = ctx.args["task"], list(ctx.args["columns"])
    samples = of_task(ctx.retain, task, columns, ctx.num_columns)
    if not len(samples):
        return Local(0, {})
    ctx.model.load(ctx.received)
    training = settings(ctx, epochs=int(ctx.args["epochs"]))
    batches = epochs_of(ctx, samples, training, f"round {ctx.args['place']}")
    descend(ctx.model, batches, as_trained(ctx.model, training))
    return Local(len(samples), {MODEL: ctx.model.vector()})


def of_task(samples: Samples, task: int, columns: Sequence[int], num_columns: int) -> Samples:
    """Return the samples that were seen in ``task``, to choose among ``columns`` (none: all of ``num_columns``)."""
    if not len(samples):
        return samples
    if samples.task is None:
        raise ValueError("the samples do not say in which task they were seen")
    chosen = samples.at(samples.task == task)
    mask = column_mask(columns or None, num_columns, chosen.y.device)
    chosen.mask = None if mask is None else mask.expand(len(chosen), num_columns)
    return chosen


def local_steps(training: LocalTraining, num_examples: int) -> int:
    """Return how many optimizer steps a visit with ``num_examples`` samples has."""
    return training.epochs * -(-num_examples // training.batch_size)
