"""What a run measures of itself: training as clients report it, the global model on test data, personal models."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

from torch import Tensor

from fedcl.client.local_evaluation import iteration
from fedcl.evaluation.evaluator import Evaluator
from fedcl.scenario.task import Stage, Stream
from fedcl.server.exchange import EventLog, Exchange
from fedcl.server.rounds import Arrival
from fedcl.server.strategy import Outgoing

_PHASES = {"accuracy_received": ("received", "accuracy"), "accuracy_trained": ("trained", "accuracy")}


class Record(EventLog, Protocol):
    """Where a run is recorded; :class:`fedcl.results.recorder.Recorder` is one."""

    def row(
        self,
        *,
        round: int,
        phase: str,
        name: str,
        value: float,
        virtual_time: float,
        client: str = "",
        task: int = -1,
        after: int = -1,
        step: int = -1,
    ) -> None:
        """Record one value."""
        ...

    def timing(self, round: int, name: str, seconds: float) -> None:
        """Record measured seconds."""
        ...


@dataclass(frozen=True)
class Known:
    """What a run knows of itself beforehand: costs by name, and in a simulation each client's samples by class."""

    costs: Mapping[str, float] = field(default_factory=dict)
    class_counts: Mapping[str, Mapping[int, int]] = field(default_factory=dict)


class Measurement:
    """Turns what happened into rows of the metrics table. ``headline`` is the last accuracy, in words.

    It is the mean over the seen tasks that have test samples, and says so if the model was edited since.
    """

    def __init__(self, record: Record, stream: Stream, evaluator: Evaluator | None, known: Known | None = None) -> None:
        self.record, self.stream, self.evaluator, self.known = record, stream, evaluator, known or Known()
        self.headline = self._tested = self._since = ""

    def initial(self, model: Tensor, now: float) -> None:
        """Test the model on every task before it has learned anything: the baseline of forward transfer."""
        for name, value in self.known.costs.items():
            self.record.row(round=-1, phase="server", name=name, value=value, virtual_time=now)
        if self.evaluator is None:
            return
        row = partial(self.record.row, round=-1, phase="test", virtual_time=now)
        for task, value in self.evaluator.accuracy(model, list(range(self.stream.num_tasks)), after=0).items():
            row(name="accuracy", value=value, task=task)
            row(name="num_test_examples", value=float(self.evaluator.num_samples(task)), task=task)

    def test(self, model: Tensor, server_round: int, now: float, stage: Stage, seen: Collection[int]) -> None:
        """Test the global model on the tasks ``seen`` so far, at the end of a stage on all."""
        if self.evaluator is None:
            return
        tasks = list(range(self.stream.num_tasks)) if stage.ends else sorted(seen)
        accuracy = self.evaluator.accuracy(model, tasks, after=seen)
        values = [value for task, value in accuracy.items() if task in seen]
        self._tested = f"accuracy {sum(values) / len(values):.3f}" if values else "no test samples yet"
        self.headline = self._tested + self._since
        if self.evaluator.undefined:
            samples = {str(task): count for task, count in self.evaluator.undefined.items()}
            self.record.event("test_undefined", round=server_round, virtual_time=now, samples=samples)
        row = self._test_row(server_round, now, stage)
        for task, value in accuracy.items():
            row(name="accuracy", value=value, task=task)

    def edited(self) -> None:
        """Say beside the last accuracy that it is from before a request, and beside the next that it is from after."""
        if self.headline:
            self.headline = f"{self._tested} before the last request"
        self._since = " after the last request"

    def classes(self, model: Tensor, server_round: int, now: float, stage: Stage, seen: Collection[int]) -> None:
        """Test the global model on each class: what a joint run is a reference for, task by task."""
        if self.evaluator is None:
            return
        row = self._test_row(server_round, now, stage)
        for label, value in self.evaluator.accuracy_by_class(model, seen).items():
            row(name=f"accuracy_class_{label}", value=value)

    def stale_classes(
        self, model: Tensor, server_round: int, now: float, stage: Stage, seen: Collection[int], late: Collection[str]
    ) -> None:
        """Test the global model on the classes that ``late`` clients hold, each class weighted by their samples."""
        held = sum((Counter(self.known.class_counts.get(client, {})) for client in late), Counter[int]())
        if self.evaluator is None or not held:
            return
        accuracy = {c: a for c, a in self.evaluator.accuracy_by_class(model, seen).items() if held[c]}
        weight = sum(held[label] for label in accuracy)
        if weight:
            value = sum(held[label] * accuracy[label] for label in accuracy) / weight
            self._test_row(server_round, now, stage)(name="accuracy_stale", value=value)

    def _test_row(self, server_round: int, now: float, stage: Stage) -> Callable[..., None]:
        return partial(self.record.row, round=server_round, phase="test", after=stage.index, virtual_time=now)

    def personal(
        self,
        exchange: Exchange,
        outgoing: Sequence[Outgoing],
        server_round: int,
        version: int,
        now: float,
        stage: int,
        seen: Mapping[str, Collection[int]],
    ) -> None:
        """Test what each client would use after aggregation, on its own test samples of every task it has ``seen``."""
        row = partial(self.record.row, round=server_round, phase="personal", after=stage, virtual_time=now)
        for task_id in sorted({task_id for tasks in seen.values() for task_id in tasks}):
            tasks = {c: self.stream.test_task(task_id, after=own) for c, own in seen.items() if task_id in own}
            asked = [out for out in outgoing if out.client in tasks]
            replies = exchange.tell("evaluate", asked, tasks.__getitem__, server_round, version)
            for client, reply in replies.items():
                if reply.num_examples:
                    row(name="accuracy", value=reply.metrics["accuracy"], client=client, task=task_id)

    def training(self, counted: Sequence[Arrival], server_round: int, now: float, *, late: bool) -> None:
        """Record what clients report of their training; with ``late``, also when they came and how late."""
        for one in counted:
            request, reply = one.flight.request, one.reply
            assert reply is not None
            assert request.task is not None
            values = {"num_examples": float(reply.num_examples), **reply.metrics}
            if late:
                age = one.update.age if one.update is not None else 0
                values |= {"age": float(age), "arrival": one.flight.arrival}
            for key, value in sorted(values.items()):  # in a fixed order, whichever way they came
                at = iteration(key)
                phase, name = _PHASES.get(key, ("train", key)) if at is None else ("iteration", "accuracy")
                self.record.row(
                    round=server_round,
                    phase=phase,
                    name=name,
                    value=value,
                    client=request.client,
                    task=request.task.id if at is None else at[0],
                    after=request.task.id,
                    step=-1 if at is None else at[1],
                    virtual_time=now,
                )

    def server(self, metrics: dict[str, float], server_round: int, now: float, stage: int) -> None:
        """Record what the strategy reports of itself."""
        row = partial(self.record.row, round=server_round, phase="server", virtual_time=now)
        for name, value in metrics.items():
            row(name=name, value=value, task=stage, after=stage)
