"""What in a run will mislead, as far as it is known before the run begins: printed once, and recorded with the run."""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedcl.assembly import learner_factories
from fedcl.client.buffer import ReplayBuffer
from fedcl.config.checks import is_local
from fedcl.config.compose import Config
from fedcl.contracts.learner import Plugin
from fedcl.data import partition
from fedcl.results import schema
from fedcl.results.caveats import named
from fedcl.results.recorder import Recorder
from fedcl.runs.setup import Setup
from fedcl.scenario.materialise import materialise, targets
from fedcl.scenario.task import Stream

Columns = NDArray[np.int64]  # (N,), the logit column that is right for each test sample of a task


def cautions(cfg: Config, stream: Stream, rights: Sequence[Columns]) -> list[str]:
    """Return a sentence for each thing that makes numbers of this run misleading.

    ``rights`` are the run's :func:`right_columns`.
    """
    plugins = {place: build() for place, build in learner_factories(cfg).items()}
    return [*_untested(rights), *_trivial(stream, rights), *_buffers(plugins)]


def report_partition(cfg: Config, setup: Setup, rights: Sequence[Columns], recorder: Recorder, *, quiet: bool) -> None:
    """Record how the samples were assigned to clients, with the run's cautions; print what needs attention."""
    report = partition.report(setup.partition, setup.dataset.train.y)
    stream = setup.stream
    begin: dict[str, Any] = {"round": -1, "virtual_time": 0.0}
    if setup.notes:
        report["notes"] = list(setup.notes)
    recorder.event(
        "partition",
        **begin,
        **report,
        tasks=[list(stream.train_task(k).classes) for k in range(stream.num_tasks)],
        test_samples=[len(right) for right in rights],
        constant_accuracy=constant_accuracy(stream, rights),
    )
    for text in cautions(cfg, stream, rights):
        recorder.event(schema.WARNING, **begin, text=text)
        if not quiet:
            print(f"fedcl: warning: {text}", file=sys.stderr)
    if report["coverage"] < 1.0 and not quiet and not is_local(cfg):
        print(f"the clients hold {report['coverage']:.1%} of the train samples", file=sys.stderr)


def right_columns(setup: Setup) -> list[Columns]:
    """Return for each task the logit columns that are right for the server's test samples of it; perhaps none."""
    stream, y = setup.stream, setup.dataset.test.y
    tasks = [stream.test_task(task, after=range(stream.num_tasks)) for task in range(stream.num_tasks)]
    return [targets(task, y[materialise(task, y)]) for task in tasks]


def constant_accuracy(stream: Stream, rights: Sequence[Columns]) -> float:
    """Return the best average accuracy of a model that always predicts the same class.

    Tasks that choose among the same columns share the answer. NaN without test samples.
    """
    shares: dict[tuple[int, ...], list[NDArray[np.float64]]] = defaultdict(list)
    for task, right in enumerate(rights):
        if len(right):
            counts = np.bincount(right, minlength=sum(stream.heads))
            shares[_choices(stream, task)].append(counts / len(right))
    number = sum(len(tasks) for tasks in shares.values())
    return float(sum(np.sum(tasks, axis=0).max() for tasks in shares.values()) / number) if number else float("nan")


def _choices(stream: Stream, task: int) -> tuple[int, ...]:
    """Return the columns that a prediction of ``task`` may choose from when the stream is over."""
    mask = stream.test_task(task, after=range(stream.num_tasks)).mask
    return tuple(range(sum(stream.heads))) if mask is None else tuple(sorted(mask))


def _untested(rights: Sequence[Columns]) -> list[str]:
    without = [task for task, right in enumerate(rights) if not len(right)]
    if not without or len(without) == len(rights):
        return []  # a server that has no test samples at all tests nothing, which the report says
    others, verb = len(rights) - len(without), "have" if len(without) > 1 else "has"
    return [
        f"{named('task', without)} {verb} no test samples: accuracy, forgetting and transfer are means over the "
        f"{others} other task{'s' * (others > 1)}"
    ]


def _trivial(stream: Stream, rights: Sequence[Columns]) -> list[str]:
    """Report tasks on which one constant prediction is always right, so that 100 % does not show learning."""
    present: dict[tuple[int, ...], set[int]] = defaultdict(set)
    for task, right in enumerate(rights):
        present[_choices(stream, task)].update(right.tolist())
    trivial = [task for task, right in enumerate(rights) if len(right) and len(present[_choices(stream, task)]) == 1]
    if trivial:
        single = [task for task in trivial if len(_choices(stream, task)) == 1]
        why = "there is one class to choose" if single == trivial else "all test samples are of one class"
        before = ", before it has learned anything too" if single == trivial else ""
        return [
            f"in {named('task', trivial)} {why}: a model that always gives the same answer scores 100 %{before}; "
            "give tasks two classes or more"
        ]
    mask = stream.test_task(0, after=[0]).mask
    if mask is not None and len(mask) == 1 and len(rights[0]):
        return ["after task 0 one class has been seen, which is all a model may answer: it scores 100 % on it whatever"]
    return []


def _buffers(plugins: Mapping[str, Plugin]) -> list[str]:
    """Report learners that each keep samples: memory and replay are then the sum of both."""
    held = {
        place.removeprefix("learner."): f"{value.budget.amount} {'bytes' if value.budget.in_bytes else 'samples'}"
        for place, plugin in plugins.items()
        for value in vars(plugin).values()
        if isinstance(value, ReplayBuffer) and value.enabled
    }
    if len(held) < 2:
        return []
    each = ", ".join(f"{place} {budget}" for place, budget in held.items())
    return [f"learner={'+'.join(held)}: each keeps a buffer of its own ({each}); a client holds and replays them all"]
