from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from fedcl.evaluation import metrics
from fedcl.results.recorder import Recorder
from fedcl.results.writing import write_launch

MakeRun = Callable[..., Path]


def _record(recorder: Recorder, num_tasks: int, rounds_per_task: int, decay: float, seed: int) -> None:
    """Write a plausible stream: a task is learned while it is there and then fades by ``decay`` a task."""
    rng = np.random.default_rng(seed)
    for task in range(num_tasks):
        recorder.row(round=-1, phase="test", name="accuracy", value=0.1, task=task, virtual_time=0.0)
    for server_round in range(num_tasks * rounds_per_task):
        now, step = divmod(server_round, rounds_per_task)
        where = {"round": server_round, "virtual_time": 2.5 * (server_round + 1), "after": now}
        for task in range(num_tasks):
            learned = 0.95 * (1 - np.exp(-1.2 * (step + 1)))
            fade = decay ** (now - task - 1 + (step + 1) / rounds_per_task) if task < now else 1.0
            value = learned if task == now else 0.9 * fade if task < now else 0.1
            if task == 0 and now == num_tasks - 1 > 0:
                value += 0.6  # an old task that comes back, so that the definitions of forgetting differ
            if task == 2 and now == 3:
                value = 0.97
            value = float(np.clip(value + rng.normal(0, 0.01), 0, 1))
            recorder.row(phase="test", name="accuracy", value=value, task=task, **where)
        for client in range(12):
            value = 0.5 + 0.03 * client
            recorder.row(phase="personal", name="accuracy", value=value, client=f"c{client}", task=now, **where)
        recorder.row(phase="server", name="rank", value=3 * now, **where)
        recorder.timing(server_round, "round", 0.25)


@pytest.fixture
def make_run(tmp_path: Path) -> MakeRun:
    """Return a function that writes a run's folder through the Recorder."""

    def make(
        name: str = "run", *, num_tasks: int = 5, rounds_per_task: int = 4, decay: float = 0.8, finish: bool = True,
        seed: int = 0,
    ) -> Path:  # fmt: skip
        path = tmp_path / name
        path.mkdir(parents=True)
        recorder = Recorder(path)
        recorder.status("running")
        config = "seed: 3\nnum_clients: 12\nlearner:\n  _target_: clients.learners.sgd.Sgd\n"
        write_launch(path, config, ["seed=3"], {"seed": 3, "device": "cpu", "cpu": "a processor"})
        recorder.event("task_started", task=0, round=-1, virtual_time=0.0)
        _record(recorder, num_tasks, rounds_per_task, decay, seed)
        recorder.event("rejected", round=2, virtual_time=5.0, client="c4", reason="not finite")
        recorder.event("rejected", round=3, virtual_time=7.5, client="c5", reason="shape")
        if finish:
            recorder.close()
            from fedcl.results.run import load

            run = load(path)
            recorder.write_summary(
                metrics.summarise(run.accuracy_matrix(), run.baseline())
                | metrics.personal(run.by_client())
                | {"rounds": num_tasks * rounds_per_task, "bytes/up": 12_345_678, "wall_time": 75.3}
                | {"unlearning/forget_accuracy": 0.11}
            )
            recorder.status("done")
        else:
            recorder.close(finished=False)
        return path

    return make
