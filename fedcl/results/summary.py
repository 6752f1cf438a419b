"""The flat summary of a run, from its tables."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np

from fedcl.evaluation.metrics import (
    average_accuracy,
    average_incremental_accuracy,
    learning_accuracy,
    personal,
    summarise,
)
from fedcl.results import reading, schema, sums
from fedcl.results.caveats import mostly_empty_rounds, served_after_last_test, untested_tasks
from fedcl.results.curves import anytime, client_forgetting, stability
from fedcl.results.run import Run, load
from fedcl.results.target import REACHED

_NOT_COMPARED = ("wall_time", "clients_per_second")


def summary(run_dir: Path, bytes_up: int, bytes_down: int) -> dict[str, float]:
    """Return the keys of ``schema.SUMMARY_KEYS`` that the run's tables support; rates in [0, 1], times in seconds."""
    run = load(run_dir)
    result: dict[str, float] = {}
    matrix = run.accuracy_matrix()
    if not matrix.empty:
        result.update(_continual(run))
    result.update(_personal(run))
    result.update(stability(run))
    result.update(_cost(run))
    result.update(_unlearning(run))
    result.update(_target(run))
    trained = run.metrics[(run.metrics["phase"] == "train") & (run.metrics["name"] == "num_examples")]
    ages = run.metrics.loc[run.metrics["name"] == "age", "value"]
    punctual = 0.0 if not _may_be_late(run) else float("nan")  # where all are waited for, nobody is late
    # a resumed run adds up the seconds of its parts
    seconds = float(run.timings.loc[run.timings["name"] == "round", "seconds"].sum())
    result.update(
        {
            "bytes/up": float(bytes_up),
            "bytes/down": float(bytes_down),
            "clients_per_second": len(trained) / seconds if seconds else float("nan"),
            "rounds": float(run.metrics["round"].max() + 1) if len(run.metrics) else 0.0,
            "staleness/mean": float(ages.mean()) if len(ages) else punctual,
            "staleness/max": float(ages.max()) if len(ages) else punctual,
            "virtual_time": float(run.metrics["virtual_time"].max()) if len(run.metrics) else float("nan"),
            "wall_time": seconds,
        }
    )
    counts = {"rounds_mostly_empty": mostly_empty_rounds(run), "clients_unheard": len(run.unheard())}
    return result | {key: float(count) for key, count in counts.items() if count}


def _may_be_late(run: Run) -> bool:
    options = run.config.get("async") or {}
    return options.get("buffer") is not None or options.get("deadline") is not None


def _continual(run: Run) -> dict[str, float]:
    """Return the numbers of the global model's accuracy matrix, and of its curve by round."""
    matrix = run.accuracy_matrix().to_numpy()
    result = summarise(matrix, run.baseline()) | {"accuracy/learning": learning_accuracy(matrix)}
    samples = run.metrics[(run.metrics["phase"] == "test") & (run.metrics["name"] == "num_test_examples")]
    sizes = samples.set_index("task")["value"].reindex(range(len(matrix))).to_numpy(dtype=np.float64, copy=True)
    untested = untested_tasks(run)
    if untested:
        result["tasks_untested"] = float(len(untested))
        sizes[[task for task in untested if task < len(sizes)]] = 0.0  # that is why they were not tested
    if not np.isnan(sizes).any():
        result["accuracy/average_incremental_samples"] = average_incremental_accuracy(matrix, sizes)
    for key, value in (("anytime", anytime(run)), ("stale_classes", _stale(run))):
        if not math.isnan(value):
            result[f"accuracy/{key}"] = value
    return result


def _cost(run: Run) -> dict[str, float]:
    """Return what training took: FLOPs over all visits, parameters, and the largest state a client kept, in bytes."""
    table = run.metrics
    per_sample = _last(run, "server", "flops_per_sample")
    trained = table[(table["phase"] == "train") & (table["name"] == "samples_trained")]["value"]
    states = table[(table["phase"] == "train") & (table["name"] == "state_bytes")]["value"]
    costs = {
        "cost/parameters": _last(run, "server", "parameters"),
        "cost/parameters_fixed": _last(run, "server", "parameters_fixed"),
        "cost/flops": per_sample * float(trained.sum()),
        "cost/state_bytes": float(states.max()) if len(states) else float("nan"),
    }
    return {key: value for key, value in costs.items() if not math.isnan(value)}


def _unlearning(run: Run) -> dict[str, float]:
    """Return the measurements of the last requests served, and what is known again of all of them at the end.

    What the last ones have no measurement of is missing, not that of requests before them.
    """
    rows = run.metrics[run.metrics["phase"] == "unlearning"]
    served = run.events.loc[run.events["kind"] == "request_served", "round"]
    if len(served):
        later = rows["name"].str.startswith("revival/")
        rows = rows[later | (rows["round"] == served.max() - 1)]  # an event's round is the one that came next
    last = rows.drop_duplicates("name", keep="last")  # one that is NaN is the last all the same
    result = {f"unlearning/{name}": float(value) for name, value in zip(last["name"], last["value"], strict=True)}
    if len(served):
        result["unlearning/requests_after_last_test"] = float(len(served_after_last_test(run)))
    return result


def _stale(run: Run) -> float:
    """Return the accuracy on the classes of late clients at the last test; NaN where nobody was late by then."""
    rows = run.metrics[(run.metrics["phase"] == "test") & (run.metrics["round"] == run.accuracy["round"].max())]
    values = rows.loc[rows["name"] == "accuracy_stale", "value"]
    return float(values.iloc[-1]) if len(values) else float("nan")


def _target(run: Run) -> dict[str, float]:
    """Return what reaching ``target_accuracy`` took, where it was asked for: rounds, bytes both ways, virtual time."""
    target = run.config.get("target_accuracy")
    if target is None:
        return {}
    noted = run.events[run.events["kind"] == REACHED]
    result = {"target/accuracy": float(target), "target/reached": float(len(noted) > 0)}
    if len(noted):
        when = noted.iloc[0]
        result["target/rounds"] = float(when["round"]) + 1
        result |= {f"target/{name}": float(when[name]) for name in ("bytes", "virtual_time")}
    return result


def _last(run: Run, phase: str, name: str) -> float:
    """Return the last value recorded under a name; NaN where there is none."""
    values = run.metrics[(run.metrics["phase"] == phase) & (run.metrics["name"] == name)]["value"]
    return float(values.iloc[-1]) if len(values) else float("nan")


def _personal(run: Run) -> dict[str, float]:
    """Return what clients would get for themselves: after aggregation, and right after their own training."""
    result: dict[str, float] = {}
    after_aggregation = run.by_client("personal")
    if after_aggregation:
        result.update(personal(after_aggregation))
        result["personal/accuracy_std"] = float(np.std(list(after_aggregation.values())))
        lost = client_forgetting(run).dropna()
        if len(lost):
            result["personal/forgetting_mean"] = float(lost.mean())
        matrix = run.reached_matrix()
        if len(matrix):
            result["personal/minus_global"] = result["personal/accuracy_mean"] - average_accuracy(matrix)
    for phase in ("received", "trained"):
        values = run.by_client(phase)
        if values:
            numbers = personal(values)
            result[f"personal/accuracy_{phase}"] = numbers["personal/accuracy_mean"]
            result[f"personal/accuracy_{phase}_worst10"] = numbers["personal/accuracy_worst10"]
    return result


def add_reference(run_dir: Path, reference_dir: Path) -> None:
    """Copy the reference run's numbers into the run's summary under ``reference/``."""
    own, other = reading.summary(run_dir), reading.summary(reference_dir)
    own = {key: value for key, value in own.items() if not key.startswith("reference/")}
    own.update(intransigence(load(run_dir), load(reference_dir)))
    own.update({f"reference/{key}": value for key, value in other.items() if key not in _NOT_COMPARED})
    sums.replace(run_dir / schema.SUMMARY, json.dumps(own, indent=2) + "\n")


def intransigence(run: Run, reference: Run) -> dict[str, float]:
    """Return what is not learned for the sake of earlier tasks: mean over tasks k of a*_k - R[k, k].

    a*_k is the accuracy on the classes of task k, each weighing the same, of a model that was trained on all tasks at
    once: the reference must be a run with ``scenario=joint``. Nothing is returned for another one, or where the tasks
    share classes or know their task at test, so that the joint model answers another question. Chaudhry et al. (ECCV
    2018) train a*_k on tasks 1 to k only.
    """
    tasks, scenario = _tasks(run), run.config.get("scenario", {})
    shared = len({label for task in tasks for label in task}) < sum(len(task) for task in tasks)
    joint = reference.config.get("scenario", {}).get("_target_", "").endswith(".Joint")
    if not joint or not tasks or shared or scenario.get("_target_", "").endswith(".TaskIncremental"):
        return {}
    best = [_mean([_last(reference, "test", f"accuracy_class_{label}") for label in task]) for task in tasks]
    gaps = np.asarray(best) - np.diag(run.accuracy_matrix().to_numpy())
    return {"intransigence": float(np.nanmean(gaps))} if not np.isnan(gaps).all() else {}


def _tasks(run: Run) -> list[list[int]]:
    """Return the classes of each task, as the run noted them when it began."""
    noted = run.events[run.events["kind"] == "partition"]
    return list(noted["tasks"].iloc[0]) if len(noted) and "tasks" in noted else []


def _mean(values: list[float]) -> float:
    return float(np.mean(values)) if values else float("nan")
