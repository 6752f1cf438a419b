"""FedEraser: the run's recorded rounds once more, with the remaining clients' steps in directions of today.

Liu, Ma, Yang, Wang, Liu, "FedEraser: Enabling Efficient Client-Level Data Removal from Federated Learning Models",
IWQoS 2021. A remaining client's stored change U_k says how far to go, layer by layer; a short training from the model
being erased, the calibration U'_k, says which way: W' <- W' + mean_k ||U_k|| U'_k / ||U'_k||.
``docs/methods/unlearning_history.md`` lists the differences from the published code.
"""

# P = length of the flat vector
from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from clients.unlearners.local_rounds import LocalTask, LocalTasks, Trained, run_round, train_local_task
from fedcl.contracts.requests import ErasureOutcome, ForgetRequest, Forgotten
from fedcl.contracts.unlearner import Local, UnlearnContext, Unlearner, UnlearnView
from fedcl.models.flat import Spec

if TYPE_CHECKING:
    from fedcl.contracts.strategy import LocalWork, Target, Update
    from fedcl.contracts.view import ServerView

CALIBRATE = "calibrate"


@dataclass
class Step:
    """A client's part in a stored round: its change (P,) float32, how many samples made it, and what it trained."""

    change: Tensor
    num_examples: int
    local_task: LocalTask

    def state(self) -> dict[str, Any]:
        """Return the step for a checkpoint."""
        return {"change": self.change, "num_examples": self.num_examples, "local_task": self.local_task.state()}

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> Step:
        """Read what :meth:`state` returned."""
        return cls(state["change"], int(state["num_examples"]), LocalTask.of(state["local_task"]))


class FedEraser(Unlearner):
    """Remove clients by means of a history of every client's changes.

    Parameters
    ----------
    every
        Delta t: rounds from one stored round to the next; the first round is stored.
    ratio
        r: share of ``client.epochs`` that a calibration has, rounded up, in (0, 1].
    calibrate
        Whether remaining clients are asked at all; otherwise their stored changes are summed as they are.
    """

    scopes = frozenset({"client"})
    observes = True

    def __init__(self, *, every: int = 2, ratio: float = 0.5, calibrate: bool = True) -> None:
        self.every, self.ratio, self.calibrate = every, ratio, calibrate
        self._epochs = 1
        self._seen = 0
        self._rounds: dict[int, dict[str, Step]] = {}
        self._local_tasks = LocalTasks()
        self._calibrated = 0

    def bind(self, work: LocalWork) -> None:
        self._epochs = math.ceil(self.ratio * work.training.epochs)
        self._local_tasks.stream = work.stream

    def observe(self, updates: Sequence[Update], before: Tensor, view: ServerView) -> None:
        """Store the changes of every ``every``-th round."""
        local_tasks = {update.client: self._local_tasks.take(update) for update in updates}
        if self._seen % self.every == 0:
            self._rounds[self._seen] = {
                update.client: Step(update.delta.float(), update.num_examples, local_tasks[update.client])
                for update in updates
            }
        self._seen += 1

    def unlearn(
        self, requests: Sequence[ForgetRequest], models: Mapping[Target, Tensor], view: UnlearnView
    ) -> dict[Target, Tensor]:
        """Return the erased model for every target: personal models start again from it."""
        departing_clients = Forgotten(list(requests)).clients
        erased, self._calibrated = view.initial.double(), 0
        for place, steps in sorted(self._rounds.items()):
            remaining = {c: step for c, step in steps.items() if c in view.clients and c not in departing_clients}
            # the first round's changes began at the initial model, which no client has influenced
            if self.calibrate and place and remaining:
                self._calibrated += 1
                self._renew(remaining, erased, place, view)
            erased += mean_change(remaining.values(), erased)
        return dict.fromkeys(models, erased.float())

    def _renew(self, steps: dict[str, Step], erased: Tensor, place: int, view: UnlearnView) -> None:
        """Turn stored changes, in place, into today's direction of their clients; drop those without a response."""
        local_tasks = {client: step.local_task for client, step in steps.items()}
        responses = run_round(view, CALIBRATE, erased, local_tasks, epochs=self._epochs, place=place)
        for client, step in list(steps.items()):
            trained: Trained | None = responses.get(client)
            if trained is None:
                del steps[client]
            else:
                step.change = calibrated(view.spec, step.change.double(), trained.change).float()

    def local(self, ctx: UnlearnContext, step: str) -> Local:
        if step != CALIBRATE:
            return super().local(ctx, step)
        return train_local_task(ctx)

    def metrics(self) -> dict[str, float]:
        """Return how many rounds were stored and calibrated, and the bytes of all stored changes."""
        stored = sum(step.change.nbytes for steps in self._rounds.values() for step in steps.values())
        return {
            "stored_rounds": float(len(self._rounds)),
            "stored_bytes": float(stored),
            "calibrated_rounds": float(self._calibrated),
        }

    def forget(self, request: ForgetRequest) -> ErasureOutcome:
        """Drop the stored changes of the clients that leave; those of the others have been calibrated by now."""
        name, dropped = type(self).__name__, 0
        for client in request.clients:
            self._local_tasks.drop(client)
            dropped += sum(steps.pop(client, None) is not None for steps in self._rounds.values())
        if not dropped:
            return ErasureOutcome(name, "not applicable", "stores no change of the clients that leave")
        others = "only their lengths are as before" if self.calibrate else "made from models that had seen it"
        return ErasureOutcome(
            name, "erased", f"{dropped} stored changes of those who leave; the others' stay, {others}"
        )

    def state_dict(self) -> dict[str, Any]:
        rounds = {
            str(place): {client: step.state() for client, step in steps.items()}
            for place, steps in self._rounds.items()
        }
        return {"seen": self._seen, "rounds": rounds, "tasks": self._local_tasks.state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._seen = int(state["seen"])
        self._rounds = {
            int(place): {client: Step.of(step) for client, step in steps.items()}
            for place, steps in state["rounds"].items()
        }
        self._local_tasks.load(state["tasks"])


def calibrated(spec: Spec, stored_P: Tensor, today_P: Tensor) -> Tensor:
    """Return ``today_P`` with each parameter tensor as long as ``stored_P`` has it; buffers stay those of today."""
    change_P = today_P.clone()
    for tensor in spec:
        if tensor.kind == "parameter":
            part = slice(tensor.start, tensor.stop)
            norm = torch.linalg.vector_norm(today_P[part])
            change_P[part] *= torch.linalg.vector_norm(stored_P[part]) / norm if norm > 0 else 0.0
    return change_P


def mean_change(steps: Iterable[Step], like_P: Tensor) -> Tensor:
    """Return the mean of changes, weighted by samples, float64 (P,); zero without any."""
    total_P, samples = torch.zeros_like(like_P), 0
    for step in steps:
        total_P += step.num_examples * step.change.double()
        samples += step.num_examples
    return total_P / max(samples, 1)
