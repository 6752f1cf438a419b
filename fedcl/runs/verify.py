"""Verifying a run's certificates: by themselves, as a chain, against the run, and exact ones by retraining."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import torch

from fedcl.config.compose import Config
from fedcl.config.value_rules import ConfigError
from fedcl.contracts.requests import ForgetRequest, Forgotten
from fedcl.results import reading
from fedcl.results.checkpoint import Checkpoints
from fedcl.results.launches import Trust, launched
from fedcl.runs.retrained import SimulatedReference, inline
from fedcl.runs.setup import Setup
from fedcl.simulation.backend import open_backend
from fedcl.unlearning.certificate import model_digest
from fedcl.unlearning.verification import Finding, against_run, read


def verify(run_dir: Path, *, retrain: bool = True, trust: Trust | None = None) -> bool:
    """Print a line for each certificate, and return whether all are valid.

    Exact methods of a simulation are verified by retraining from the seed, unless ``retrain`` is false. For that,
    ``trust`` says whose code the folder may run besides fedcl's.

    Raises
    ------
    ConfigError
        If the run has no certificates.
    """
    findings = read(run_dir)
    noted = _noted(run_dir)
    state = Checkpoints(run_dir).load()[0]["server"] if Checkpoints(run_dir).begun() else None
    if not findings and not noted:
        raise ConfigError(f"{run_dir}: has no certificates; no request to forget was processed here")
    unlearning = {} if state is None else state.get("unlearning", {})
    requests = [ForgetRequest.from_json(text) for text in unlearning.get("forgotten", [])]
    processed = None if state is None else [json.loads(text)["id"] for text in unlearning.get("processed", [])]
    last = None if state is None else (state["next_round"], model_digest(state["models"]))
    against_run(findings, processed, noted, last)
    retraining = _Retraining(run_dir, requests, processed or [], trust) if retrain else None
    for finding in findings:
        checked = ["chain", *(["checkpoint"] if state is not None else [])]
        if not finding.faults and retraining is not None:
            checked.append(retraining.check(finding))
        what = f"invalid: {'; '.join(finding.faults)}" if finding.faults else f"valid ({', '.join(checked)})"
        print(f"{finding.name}: {what}", flush=True)
    return not any(finding.faults for finding in findings)


def _noted(run_dir: Path) -> dict[str, str]:
    """Return the hash of each certificate by request id, as the run recorded it."""
    certified = [event for event in reading.events(run_dir) if event["kind"] == "request_certified"]
    return {str(event.get("request")): str(event.get("sha256")) for event in certified}


class _Retraining:
    """Retrains what exact certificates claim, once for each set of requests that were processed together."""

    def __init__(
        self, run_dir: Path, requests: list[ForgetRequest], processed: list[str], trust: Trust | None = None
    ) -> None:
        self._trust = trust
        self._run_dir, self._requests, self._processed = run_dir, requests, processed
        self._hashes: dict[tuple[int, int], str] = {}

    def check(self, finding: Finding) -> str:
        """Compare the models with those of a new run, or return why that cannot be done."""
        content = finding.content
        together = [content["request"]["id"], *content["processed_with"]]
        if not content["unlearner"].get("retrains"):
            return "not an exact method: nothing to do again"
        if content["options"].get("recovery_rounds"):
            return "rounds followed at once: not done again"
        if content["versions"].get("torch") != torch.__version__:
            return f"made with torch {content['versions'].get('torch')}: not done again"
        cfg = launched(self._run_dir, self._trust).cfg
        if cfg["backend"]["name"] == "flower":
            return "its clients are devices: not done again"
        if not set(together) <= set(self._processed):
            return "without a checkpoint that names the requests: not done again"
        count = 1 + max(self._processed.index(name) for name in together)
        if self._models(cfg, count, content["server_round"]) != content["model"]["after"]:
            finding.faults.append("model.after: retraining gives other models")
        return "done again"

    def _models(self, cfg: Config, count: int, until: int) -> str:
        """Return the hash after ``until`` rounds without what the first ``count`` processed requests name."""
        key = (count, until)
        if key not in self._hashes:
            here = inline(cfg)
            setup = Setup.of(here)
            ids = set(self._processed[:count])
            forgotten = Forgotten([request for request in self._requests if request.id in ids])
            with (
                tempfile.TemporaryDirectory() as folder,
                open_backend(here, setup.dataset, setup.partition) as backend,
            ):
                state, _ = SimulatedReference(here, setup, backend, Path(folder)).run(forgotten, until)
            self._hashes[key] = model_digest(state["models"])
        return self._hashes[key]
