"""Names and types of everything in a run's folder: one place that writer and readers share.

A run's folder holds ``config.yaml overrides.yaml env.json STATUS metrics.jsonl metrics.parquet timings.jsonl
timings.parquet events.jsonl summary.json SHA256SUMS certificates/ checkpoints/ figures/ report.html``, and ``.lock``.
"""

from __future__ import annotations

from typing import Final, NamedTuple

CONFIG: Final = "config.yaml"
OVERRIDES: Final = "overrides.yaml"
ENV: Final = "env.json"
STATUS: Final = "STATUS"
SUMMARY: Final = "summary.json"
METRICS: Final = "metrics"
TIMINGS: Final = "timings"
EVENTS: Final = "events"
REFERENCE: Final = "reference"
FIGURES: Final = "figures"
REPORT: Final = "report.html"
SWEEP: Final = "sweep.json"
SUMS: Final = "SHA256SUMS"

TABLES: Final = (METRICS, TIMINGS, EVENTS)
"""Tables written line by line while a run goes on; the keys of the byte offsets in a checkpoint."""

LAUNCH: Final = (CONFIG, OVERRIDES, ENV)
"""Files that say what a run is: written when it begins, ``config.yaml`` last, and never changed."""

WRITTEN: Final = (*(f"{table}.jsonl" for table in TABLES), f"{METRICS}.parquet", f"{TIMINGS}.parquet", SUMMARY)
"""Files with what a run has measured: as they are to stay once it is done."""

METRIC_COLUMNS: Final[dict[str, str]] = {
    "round": "int64",
    "virtual_time": "float64",
    "client": "str",
    "task": "int64",
    "after": "int64",
    "step": "int64",
    "phase": "str",
    "name": "str",
    "value": "float64",
}
"""Column -> type of the metrics table, in the order of the file. No wall times: equal runs have equal bytes."""

TIMING_COLUMNS: Final[dict[str, str]] = {"round": "int64", "name": "str", "seconds": "float64"}
"""Column -> type of the wall-clock timings, kept apart because they differ between equal runs."""

EVENT_FIELDS: Final = ("round", "virtual_time", "kind")
"""Fields that every event has; others depend on the kind."""

WARNING: Final = "warning"
"""The kind of the event that numbers of the run say something else than they seem to; its ``text`` is a sentence."""

MOSTLY_EMPTY: Final = "round_mostly_empty"
"""The kind of the event that most of a round's clients hold nothing of their task."""

PHASES: Final = ("train", "test", "received", "trained", "personal", "iteration", "server", "unlearning")
"""``train``: while a client learns. ``test``: the global model on test data. ``received``: a client's model before its
local steps, ``trained``: after them. ``personal``: the model a client would use after aggregation. ``iteration``: a
client's model after so many of its local steps. ``server``: what the strategy reports of itself (a subspace's rank, the
share of frozen parameters). ``unlearning``: what serving requests did, and what is known again later."""

SUMMARY_KEYS: Final = (
    "accuracy/average",
    "accuracy/average_incremental",
    "accuracy/average_incremental_samples",
    "accuracy/anytime",
    "accuracy/learning",
    "accuracy/stale_classes",
    "forgetting/chaudhry",
    "forgetting/first",
    "forgetting/peak",
    "bwt",
    "fwt",
    "personal/accuracy_mean",
    "personal/accuracy_received",
    "personal/accuracy_received_worst10",
    "personal/accuracy_trained",
    "personal/accuracy_trained_worst10",
    "personal/accuracy_worst10",
    "personal/accuracy_std",
    "personal/forgetting_mean",
    "personal/minus_global",
    "intransigence",
    "staleness/mean",
    "staleness/max",
    "bytes/up",
    "bytes/down",
    "clients_per_second",
    "rounds",
    "rounds_mostly_empty",
    "tasks_untested",
    "clients_unheard",
    "virtual_time",
    "wall_time",
)
"""Stable keys of ``summary.json``. Rates lie in [0, 1], times are seconds, traffic is bytes."""

SUMMARY_PREFIXES: Final = ("unlearning/", "reference/", "stability/", "cost/", "target/")
"""Open families of keys: which of them a run has depends on its unlearner, ``compare_with`` and ``evaluation``."""


class Row(NamedTuple):
    """One measured value: a line of the metrics table, fields in the order of ``METRIC_COLUMNS``."""

    round: int
    """0-based server round after which the value holds; -1 before training."""
    virtual_time: float
    """Virtual clock, seconds."""
    client: str
    """Client id; empty for the global model."""
    task: int
    """Task that was evaluated or trained; -1 when the value belongs to none."""
    after: int
    """Task, or stage, that the stream had reached; -1 before training."""
    step: int
    """Optimizer steps of the visit, in phase ``iteration``; -1 elsewhere."""
    phase: str
    """One of ``PHASES``."""
    name: str
    """What was measured: ``accuracy``, ``loss``, ``num_examples``, ``rank``, ..."""
    value: float
    """The value; not finite is stored as missing."""


def is_summary_key(key: str) -> bool:
    """Whether ``summary.json`` may have this key."""
    return key in SUMMARY_KEYS or key.startswith(SUMMARY_PREFIXES)
