"""A run with rows of every kind that figures and the report look at, and names that are not harmless."""

from __future__ import annotations

from itertools import permutations
from pathlib import Path
from typing import Any

from fedcl.results.recorder import Recorder

NAMES = ("late", "$\\bad$", "a<b>&\"'")


def write_run(path: Path, *, everything: bool = True) -> None:
    """Write a run; without ``everything`` only what most runs have."""
    with Recorder(path) as recorder:
        recorder.row(round=-1, phase="server", name="flops_per_sample", value=100.0, virtual_time=0.0)
        for at in range(4):
            when: dict[str, Any] = {"round": at, "virtual_time": 1.5 * (at + 1), "after": at // 2}
            for task in range(at // 2 + 1):
                recorder.row(phase="test", name="accuracy", value=0.5 + 0.1 * at - 0.05 * task, task=task, **when)
            for place, client in enumerate(NAMES):
                train = {"phase": "train", "client": client, "task": at // 2, **when}
                recorder.row(name="num_examples", value=10, **train)
                recorder.row(name="samples_trained", value=20, **train)
                if everything:
                    _write_client(recorder, at, place, when)
            if everything:
                _write_server(recorder, at, when)
            for name in ("bytes_up", "bytes_down"):
                recorder.row(phase="server", name=name, value=1000.0 * (at + 1), **when)
        if everything:
            _write_unlearning(recorder)
            recorder.event("hindsight", round=3, client=NAMES[0], age=2, inverted=0.25, late=0.75, virtual_time=0.0)
            recorder.event("hindsight", round=3, client=NAMES[1], age=2, inverted=0.75, late=1.25, virtual_time=0.0)
        recorder.event("client_failed", round=1, client=NAMES[2], reason="<script>alert(1)</script>", virtual_time=0.0)
        recorder.event("round_skipped", round=2, replies=0, virtual_time=0.0)
        recorder.write_summary({"stability/iteration/min_accuracy": 0.35})


def _write_client(recorder: Recorder, at: int, place: int, when: dict[str, Any]) -> None:
    client = NAMES[place]
    recorder.row(phase="train", name="age", value=min(at, place), client=client, task=at // 2, **when)
    for step in (0, 5, 10):
        where = {"phase": "iteration", "client": client, "task": 0, "step": step, **when}
        recorder.row(name="accuracy", value=0.9 - 0.01 * at * step - 0.1 * place, **where)
    recorder.row(phase="personal", name="accuracy", value=0.2 + 0.3 * place, client=client, task=0, **when)


def _write_server(recorder: Recorder, at: int, when: dict[str, Any]) -> None:
    for one, other in permutations(NAMES, 2):
        value = 0.7 if NAMES[0] in (one, other) else 0.9
        recorder.row(phase="server", name=f"collaboration/overlap/{one}/{other}", value=value, **when)
    recorder.row(phase="server", name="collaboration/threshold", value=0.8, **when)
    for layer, rank in (("hidden.0", 3 + at), ("hidden.1", 2)):
        recorder.row(phase="server", name=f"projection/rank/{layer}", value=rank, **when)
        recorder.row(phase="server", name=f"projection/frozen_share/{layer}", value=rank / 10, **when)


def _write_unlearning(recorder: Recorder) -> None:
    where: dict[str, Any] = {"round": 1, "virtual_time": 3.0, "phase": "unlearning"}
    for name, value in (("forget_test_accuracy", 0.4), ("test_accuracy", 0.8), ("mia_entropy", 0.3)):
        recorder.row(name=name, value=value, **where)
        recorder.row(name=f"original/{name}", value=value + 0.3, **where)
        recorder.row(name=f"reference/{name}", value=value + 0.1, **where)
    recorder.event("request_served", round=2, virtual_time=3.0, requests=["bob"])
    for at in (2, 3):
        recorder.row(round=at, virtual_time=1.5 * (at + 1), phase="unlearning", name="revival/bob", value=0.2 * at)
