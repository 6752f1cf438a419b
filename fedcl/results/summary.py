"""The flat summary of a run, from its tables."""

from __future__ import annotations

import json
from pathlib import Path

from fedcl.evaluation.metrics import personal, summarise
from fedcl.results import schema
from fedcl.results.recorder import write_atomic
from fedcl.results.run import Run, load

_NOT_COMPARED = ("wall_time", "clients_per_second")


def summary(run_dir: Path, bytes_up: int, bytes_down: int) -> dict[str, float]:
    """Return the keys of ``schema.SUMMARY_KEYS`` that the run's tables support; rates in [0, 1], times in seconds."""
    run = load(run_dir)
    result: dict[str, float] = {}
    matrix = run.accuracy_matrix()
    if not matrix.empty:
        result.update(summarise(matrix.to_numpy(), run.baseline()))
    result.update(_personal(run))
    trained = run.metrics[(run.metrics["phase"] == "train") & (run.metrics["name"] == "num_examples")]
    ages = run.metrics.loc[run.metrics["name"] == "age", "value"]
    # a resumed run adds up the seconds of its parts
    seconds = float(run.timings.loc[run.timings["name"] == "round", "seconds"].sum())
    result.update(
        {
            "bytes/up": float(bytes_up),
            "bytes/down": float(bytes_down),
            "clients_per_second": len(trained) / seconds if seconds else 0.0,
            "rounds": float(run.metrics["round"].max() + 1) if len(run.metrics) else 0.0,
            "staleness/mean": float(ages.mean()) if len(ages) else 0.0,
            "staleness/max": float(ages.max()) if len(ages) else 0.0,
            "virtual_time": float(run.metrics["virtual_time"].max()) if len(run.metrics) else 0.0,
            "wall_time": seconds,
        }
    )
    return result


def _personal(run: Run) -> dict[str, float]:
    """Return what clients would get for themselves: after aggregation, and right after their own training."""
    result: dict[str, float] = {}
    after_aggregation = run.by_client("personal")
    if after_aggregation:
        result.update(personal(after_aggregation))
    after_training = run.by_client("trained")
    if after_training:
        result["personal/accuracy_trained"] = personal(after_training)["personal/accuracy_mean"]
    return result


def add_reference(run_dir: Path, reference_dir: Path) -> None:
    """Copy the reference run's numbers into the run's summary under ``reference/``."""
    path = run_dir / schema.SUMMARY
    own = json.loads(path.read_text())
    other = json.loads((reference_dir / schema.SUMMARY).read_text())
    own = {key: value for key, value in own.items() if not key.startswith("reference/")}
    own.update({f"reference/{key}": value for key, value in other.items() if key not in _NOT_COMPARED})
    write_atomic(path, json.dumps(own, indent=2) + "\n")
