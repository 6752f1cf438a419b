"""fedcl itself as a side of a measurement: a run's server on an open backend, run round by round."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fedcl.assembly import make_schedule, make_stream, participants
from fedcl.bench.processes import tree_seconds
from fedcl.bench.turns import Side
from fedcl.bench.workload import Workload
from fedcl.config.compose import compose
from fedcl.results.recorder import Recorder
from fedcl.runs.setup import Setup, make_server
from fedcl.runs.unlearning import make_unlearning
from fedcl.server.loop import Server
from fedcl.simulation.backend import open_backend


@dataclass(frozen=True)
class Federation:
    """A run in progress: everything that ``fedcl run`` does in a round, down to the rows of its tables."""

    server: Server

    def run(self, rounds: int) -> None:
        """Run ``rounds`` more rounds."""
        self.server.run(lambda server_round: None, until=self.server.state.next_round + rounds)

    def weights(self) -> Tensor:
        """Return the global model (P,)."""
        return self.server.global_model

    def side(self, name: str, cpu: Callable[[], float] | None = None) -> Side:
        """Return it as a side; its processor time is that of this process and its descendants by default."""
        return Side(name, self.run, cpu or own_seconds)


def own_seconds() -> float:
    """Return the processor seconds of this process and its descendants."""
    return tree_seconds(os.getpid())


@contextmanager
def federation(workload: Workload, *overrides: str) -> Iterator[Federation]:
    """Open a backend and a server for ``workload``; evaluation is off, nothing else is."""
    torch.set_num_threads(1)
    cfg = compose([*workload.overrides(), *overrides])
    dataset = workload.dataset()
    stream = make_stream(cfg, dataset)
    setup = Setup(dataset, workload.partition(), stream, make_schedule(cfg, stream), participants(cfg))
    with tempfile.TemporaryDirectory(prefix="fedcl-bench-") as folder:
        run_dir = Path(folder)
        with (
            Recorder(run_dir) as recorder,
            open_backend(cfg, setup.dataset, setup.partition, None, run_dir / "clients") as backend,
        ):
            unlearning = make_unlearning(cfg, setup, backend, run_dir)
            yield Federation(make_server(cfg, setup, backend, recorder, unlearning=unlearning, evaluate=False))
