"""What a reader must know before believing the numbers of a run: a sentence each, out of the run's own tables."""

from __future__ import annotations

import math

from fedcl.evaluation.metrics import average_accuracy, measured_moments
from fedcl.results import schema
from fedcl.results.run import Run

_SHOWN = 8  # of many numbers or names


def caveats(run: Run) -> list[str]:
    """Return what of the numbers misleads, what they leave out, and which model they describe; empty where nothing."""
    warned = [str(text) for text in run.events.loc[run.events["kind"] == schema.WARNING].get("text", ())]
    return [*warned, *_moments(run), *_chance(run), *_undefined(run), *_requests(run), *_empty(run), *_unheard(run)]


def untested_tasks(run: Run) -> list[int]:
    """Return the tasks of the stream that were never tested although others were: they have no test samples."""
    if run.accuracy.empty:
        return []
    return sorted(set(range(_num_tasks(run))) - set(run.accuracy["task"]))


def served_after_last_test(run: Run) -> list[str]:
    """Return the ids of the requests that were served after the global model was tested last."""
    last = run.accuracy["round"].max() if len(run.accuracy) else -1
    return [name for server_round, name in _served(run) if server_round > last]


def mostly_empty_rounds(run: Run) -> int:
    """Return in how many rounds most of the clients that were asked hold nothing of their task."""
    return len(set(run.events.loc[run.events["kind"] == schema.MOSTLY_EMPTY, "round"]))


def _num_tasks(run: Run) -> int:
    noted = run.events[run.events["kind"] == "partition"]
    tasks = noted["tasks"].iloc[0] if len(noted) and "tasks" in noted else None
    return len(tasks) if isinstance(tasks, list) else len(run.accuracy_matrix())


def _served(run: Run) -> list[tuple[int, str]]:
    """Return (round that came next, id) of every request that was served, in order."""
    served = run.events[run.events["kind"] == "request_served"]
    return [(int(event["round"]), str(name)) for _, event in served.iterrows() for name in event["requests"]]


def _moments(run: Run) -> list[str]:
    matrix = run.reached_matrix()
    missing = [] if not len(matrix) else [k for k, known in enumerate(measured_moments(matrix)) if not known]
    if not missing:
        return []
    return [f"after {named('task', missing)} nothing was tested: maxima and means over the stream leave that out"]


def _chance(run: Run) -> list[str]:
    """Tell an average accuracy that always giving one answer would reach as well."""
    matrix = run.accuracy_matrix()
    noted = run.events[run.events["kind"] == "partition"]
    if matrix.empty or run.status != "done" or "constant_accuracy" not in noted or noted.empty:
        return []
    constant, average = float(noted["constant_accuracy"].iloc[0]), average_accuracy(matrix.to_numpy())
    if math.isnan(constant) or not average <= constant or constant == 1.0:
        return []
    return [
        f"accuracy/average is {100 * average:.2f} %, and a model that always gives the same answer has "
        f"{100 * constant:.2f} %: this one has learned nothing that shows"
    ]


def _undefined(run: Run) -> list[str]:
    rounds = sorted({int(at) for at in run.events.loc[run.events["kind"] == "test_undefined", "round"]})
    if not rounds:
        return []
    return [
        f"after {named('round', [at + 1 for at in rounds])} the global model's outputs were not finite on some test "
        "samples, which count as wrong: it has diverged"
    ]


def _requests(run: Run) -> list[str]:
    served, after = _served(run), served_after_last_test(run)
    if not served or run.accuracy.empty:
        return []
    told = []
    if after:
        told.append(
            f"accuracy, forgetting and transfer are from before {named('request', after)}: the model was not tested "
            "since; unlearning/... and the certificates describe it after"
        )
    within = [(at, name) for at, name in served if name not in after]
    if within:
        each = ", ".join(f"{name} (before round {at + 1})" for at, name in within[:_SHOWN])
        more = f" and {len(within) - _SHOWN} more" if len(within) > _SHOWN else ""
        told.append(f"the last tests are from after request{'s' * (len(within) > 1)} {each}{more}, earlier ones not")
    return told


def _empty(run: Run) -> list[str]:
    count, rounds = mostly_empty_rounds(run), len(set(run.metrics.loc[run.metrics["round"] >= 0, "round"]))
    if not count:
        return []
    return [
        f"in {count} of {rounds} rounds most of the clients that were asked hold no samples of their task, and only "
        "the others train; events.jsonl says which"
    ]


def _unheard(run: Run) -> list[str]:
    missing = sorted(run.unheard())
    if not missing:
        return []
    return [
        f"personal/... leaves out {len(missing)} client{'s' * (len(missing) > 1)} whose last evaluation was lost: "
        f"{', '.join(missing[:_SHOWN])}{' and more' * (len(missing) > _SHOWN)}"
    ]


def named(what: str, members: list[int] | list[str]) -> str:
    """Return ``task 4`` or ``tasks 0, 2, 4``, and of many the first few and how many more."""
    more = f" and {len(members) - _SHOWN} more" if len(members) > _SHOWN else ""
    return f"{what}{'s' * (len(members) > 1)} {', '.join(map(str, members[:_SHOWN]))}{more}"
