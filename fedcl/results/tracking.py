"""TensorBoard, MLflow and Weights & Biases, each a small recorder; none uses the network unless told to."""

from __future__ import annotations

import json
import os
import secrets
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fedcl.base.files import write_atomic
from fedcl.results.configurations import leaves

_MOST = 1000  # metrics that MLflow takes at once


class TensorBoard:
    """Event files in the run's folder, under ``tensorboard/``; look at them with ``tensorboard --logdir runs``."""

    needs = ("tensorboard",)

    def __init__(self) -> None:
        self._writer: Any = None

    def start(self, run_dir: Path, cfg: Mapping[str, Any], first_round: int) -> None:
        """Open the files; what an interrupted run told of rounds that are played again is hidden."""
        from torch.utils.tensorboard import SummaryWriter

        purge = first_round or None
        self._writer = SummaryWriter(str(run_dir / "tensorboard"), purge_step=purge)  # type: ignore[no-untyped-call, unused-ignore]
        self._writer.add_text("config", f"```\n{json.dumps(cfg, indent=2, default=str)}\n```")

    def log(self, server_round: int, scalars: Mapping[str, float]) -> None:
        """Write a point of each curve."""
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, server_round)
        self._writer.flush()

    def finish(self, summary: Mapping[str, Any], status: str) -> None:
        """Write the summary and close."""
        for name, value in _numbers(summary):
            self._writer.add_scalar(f"summary/{name}", value, 0)
        self._writer.close()


class MLflow:
    """A run of MLflow.

    Parameters
    ----------
    uri
        Where it is kept; None for what the environment variable ``MLFLOW_TRACKING_URI`` says, and without it a folder
        ``mlruns`` in the run's folder.
    experiment
        MLflow's name for what belongs together.
    """

    needs = ("mlflow",)

    def __init__(self, *, uri: str | None = None, experiment: str = "fedcl") -> None:
        self.uri, self.experiment = uri, experiment
        self._client: Any = None
        self._run = ""

    def start(self, run_dir: Path, cfg: Mapping[str, Any], first_round: int) -> None:
        """Create the run and its parameters, or find the one that was created before."""
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # it reports on its use otherwise
        given = self.uri or os.environ.get("MLFLOW_TRACKING_URI")
        if given is None:  # a folder is what it does without a database's packages; newer ones want it to be said
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        from mlflow.entities import Param
        from mlflow.tracking import MlflowClient

        self._client = MlflowClient(given or (run_dir / "mlruns").resolve().as_uri())
        known = run_dir / "mlflow_run"
        if known.is_file():
            self._run = known.read_text().strip()
            self._client.update_run(self._run, status="RUNNING")
            return
        found = self._client.get_experiment_by_name(self.experiment)
        experiment = self._client.create_experiment(self.experiment) if found is None else found.experiment_id
        self._run = self._client.create_run(experiment, run_name=run_dir.name).info.run_id
        params = [Param(_plain(key), str(value)[:500]) for key, value in leaves(cfg)]
        for start in range(0, len(params), 100):
            self._client.log_batch(self._run, params=params[start : start + 100])
        write_atomic(known, self._run + "\n")

    def log(self, server_round: int, scalars: Mapping[str, float]) -> None:
        """Send the numbers of a round."""
        self._send(dict(scalars), server_round)

    def finish(self, summary: Mapping[str, Any], status: str) -> None:
        """Send the summary and end the run."""
        self._send({f"summary/{name}": value for name, value in _numbers(summary)}, 0)
        ended = {"done": "FINISHED", "interrupted": "KILLED"}
        self._client.set_terminated(self._run, ended.get(status, "FAILED"))

    def _send(self, numbers: Mapping[str, float], step: int) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        metrics = [Metric(_plain(name), value, now, step) for name, value in numbers.items()]
        for start in range(0, len(metrics), _MOST):
            self._client.log_batch(self._run, metrics=metrics[start : start + _MOST])


class WandB:
    """A run of Weights & Biases, offline unless the environment variable ``WANDB_MODE`` says otherwise.

    Its files are under ``wandb/`` in the run's folder; ``wandb sync`` sends them.

    Parameters
    ----------
    project, entity
        Where it belongs.
    """

    needs = ("wandb",)

    def __init__(self, *, project: str = "fedcl", entity: str | None = None) -> None:
        self.project, self.entity = project, entity
        self._run: Any = None

    def start(self, run_dir: Path, cfg: Mapping[str, Any], first_round: int) -> None:
        """Begin, under the identifier that the folder has, so that a resumed run stays one."""
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb

        known = run_dir / "wandb_run"
        if not known.is_file():
            write_atomic(known, secrets.token_hex(4) + "\n")
        mode: Any = os.environ.get("WANDB_MODE", "offline")
        self._run = wandb.init(
            project=self.project,
            entity=self.entity,
            name=run_dir.name,
            id=known.read_text().strip(),
            resume="allow" if mode == "online" else None,  # without the network there is nothing to ask
            dir=str(run_dir),
            config=json.loads(json.dumps(cfg, default=str)),
            mode=mode,
            settings=wandb.Settings(silent=True, console="off", disable_git=True, disable_code=True),
        )

    def log(self, server_round: int, scalars: Mapping[str, float]) -> None:
        """Send the numbers of a round."""
        self._run.log(dict(scalars), step=server_round)

    def finish(self, summary: Mapping[str, Any], status: str) -> None:
        """Send the summary and end the run."""
        self._run.summary.update({f"summary/{name}": value for name, value in _numbers(summary)})
        self._run.finish(exit_code=0 if status == "done" else 1)


def _numbers(summary: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    for name, value in summary.items():
        if isinstance(value, int | float):
            yield name, float(value)


def _plain(name: str) -> str:
    """Return a name with the characters that MLflow takes."""
    return "".join(c if c.isalnum() or c in "_-. /" else "_" for c in name)
