"""What an owner may ask to have forgotten, what a run must leave out from then on, and what each part reports."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, get_args

from fedcl.contracts.fields import MAX_OUTCOMES, clean, shown
from fedcl.scenario.task import Task

Scope = Literal["client", "class", "sample", "task"]
Outcome = Literal["erased", "recomputed", "reset", "retained", "not applicable"]
MAX_PART = 120  # characters of a part's name
NAMES: dict[Scope, str] = {"client": "clients", "class": "classes", "sample": "samples", "task": "tasks"}


@dataclass(frozen=True, slots=True)
class ForgetRequest:
    """An unlearning request: its ``scope``, and the clients, classes, samples or tasks it names.

    With scope ``client`` the ``clients`` leave. With ``sample`` and ``task`` they narrow the request down to what those
    clients hold; without any it concerns everybody. ``samples`` are positions in the train half of the clients' data
    source: the shared array in a simulation, the device's own data on a device.
    """

    id: str
    scope: Scope
    clients: tuple[str, ...] = ()
    classes: tuple[int, ...] = ()
    samples: tuple[int, ...] = ()
    tasks: tuple[int, ...] = ()

    def concerns(self, client: str) -> bool:
        """Whether ``client`` may hold something of the forget set."""
        return self.scope == "class" or not self.clients or client in self.clients

    def to_json(self) -> str:
        """Return the request as text."""
        return json.dumps(asdict(self), separators=(",", ":"), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> ForgetRequest:
        """Read what :meth:`to_json` wrote."""
        raw: dict[str, Any] = json.loads(text)
        lists = {name: tuple(raw[name]) for name in NAMES.values()}
        return cls(id=raw["id"], scope=raw["scope"], **lists)


@dataclass(frozen=True, slots=True)
class ErasureOutcome:
    """What became of a part's memory of the forget set, and why; the certificate lists all outcomes."""

    part: str
    outcome: Outcome
    why: str


@dataclass
class Forgotten:
    """Everything that a run must leave out by now: the requests admitted so far."""

    requests: list[ForgetRequest] = field(default_factory=list)

    @property
    def clients(self) -> frozenset[str]:
        """Clients that have left."""
        return frozenset(client for request in self.requests if request.scope == "client" for client in request.clients)

    def add(self, requests: Iterable[ForgetRequest]) -> None:
        """Leave out ``requests`` too."""
        self.requests.extend(requests)

    def task(self, client: str, task: Task) -> Task:
        """Return ``task`` as ``client`` may still train it: without the samples of the forget sets."""
        mine = [request for request in self.requests if request.scope != "client" and request.concerns(client)]
        if not mine:
            return task
        classes = {label for request in mine for label in request.classes}
        if any(request.scope == "task" and task.id in request.tasks for request in mine):
            classes |= set(task.classes)
        samples = {position for request in mine for position in request.samples}
        return replace(
            task,
            without_classes=tuple(sorted(classes | set(task.without_classes))),
            without_samples=tuple(sorted(samples | set(task.without_samples))),
        )

    def state(self) -> list[str]:
        """Return the requests as text, in order."""
        return [request.to_json() for request in self.requests]

    @classmethod
    def of(cls, state: Sequence[str]) -> Forgotten:
        """Read what :meth:`state` returned."""
        return cls([ForgetRequest.from_json(text) for text in state])


@dataclass(frozen=True)
class ForgetInstruction:
    """What a client receives with every step of processing requests.

    ``tasks`` are those the client has seen, with the samples it could train on before ``requests``; ``args`` go to the
    unlearner's step.
    """

    requests: tuple[ForgetRequest, ...]
    tasks: tuple[Task, ...]
    args: dict[str, Any] = field(default_factory=dict)

    def leaves(self, client: str) -> bool:
        """Whether ``client`` is asked to forget everything."""
        return client in Forgotten(list(self.requests)).clients

    def to_json(self) -> str:
        """Return the instruction as the note of a message."""
        requests, tasks = [r.to_json() for r in self.requests], [task.to_json() for task in self.tasks]
        return json.dumps({"requests": requests, "tasks": tasks, "args": self.args}, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> ForgetInstruction:
        """Read what :meth:`to_json` wrote.

        Raises
        ------
        ValueError
            If it is something else.
        """
        try:
            raw = json.loads(text)
            requests = tuple(ForgetRequest.from_json(request) for request in raw["requests"])
            return cls(requests, tuple(Task.from_json(task) for task in raw["tasks"]), dict(raw["args"]))
        except (KeyError, TypeError, json.JSONDecodeError) as error:
            raise ValueError("the message does not say what to forget") from error


def outcomes_json(outcomes: Iterable[ErasureOutcome]) -> str:
    """Return outcomes as the note of a reply."""
    return json.dumps([asdict(outcome) for outcome in outcomes], separators=(",", ":"))


def outcomes_from(text: str) -> list[ErasureOutcome]:
    """Read what :func:`outcomes_json` wrote; its strings are cleaned and cut, as they go to events and certificates.

    Raises
    ------
    ValueError
        If it is something else, naming the fault.
    """
    try:
        rows = json.loads(text) if text else []
    except (ValueError, RecursionError) as error:
        raise ValueError(f"note is not valid JSON: {error}") from error
    if not isinstance(rows, list) or len(rows) > MAX_OUTCOMES:
        raise ValueError(f"note must be a list of at most {MAX_OUTCOMES} outcomes")
    return [_outcome(row) for row in rows]


def _outcome(row: Any) -> ErasureOutcome:
    if not isinstance(row, dict) or row.keys() != {"part", "outcome", "why"}:
        raise ValueError("note: an outcome must have part, outcome and why, and nothing else")
    if not all(isinstance(value, str) for value in row.values()):
        raise ValueError("note: part, outcome and why must be strings")
    if row["outcome"] not in get_args(Outcome):
        raise ValueError(f"note: outcome {shown(row['outcome'])} must be one of {', '.join(get_args(Outcome))}")
    return ErasureOutcome(clean(row["part"], MAX_PART), row["outcome"], clean(row["why"]))
