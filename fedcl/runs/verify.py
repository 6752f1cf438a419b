"""Checking a run's certificates: by themselves, as a chain, against the run, and by doing exact ones again."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import torch

from fedcl.config.compose import Config
from fedcl.config.value_rules import ConfigError
from fedcl.contracts.requests import ForgetRequest, Forgotten
from fedcl.results import reading
from fedcl.results.checkpoint import Checkpoints
from fedcl.results.launches import Trust, launched
from fedcl.runs.retrained import SimulatedReference
from fedcl.runs.setup import Setup
from fedcl.simulation.backend import open_backend
from fedcl.unlearning import certificate
from fedcl.unlearning.certificate import Finding
from fedcl.unlearning.receipt import model_digest


def verify(run_dir: Path, *, replay: bool = True, trust: Trust | None = None) -> bool:
    """Print a line for each certificate, and say whether all are valid.

    Where the method is exact and the run a simulation, it is done again from the seed, unless ``replay`` is false.

    For that, ``trust`` says whose code the folder may run besides fedcl's.

    Raises
    ------
    ConfigError
        If the run has no certificates.
    """
    findings = certificate.read(run_dir)
    noted = _noted(run_dir)
    state = Checkpoints(run_dir).load()[0]["server"] if Checkpoints(run_dir).begun() else None
    if not findings and not noted:
        raise ConfigError(f"{run_dir}: has no certificates; no request to forget was served here")
    unlearning = {} if state is None else state.get("unlearning", {})
    requests = [ForgetRequest.from_json(text) for text in unlearning.get("forgotten", [])]
    served = None if state is None else [json.loads(text)["id"] for text in unlearning.get("served", [])]
    last = None if state is None else (state["next_round"], model_digest(state["models"]))
    certificate.against_run(findings, served, noted, last)
    again = _Again(run_dir, requests, served or [], trust) if replay else None
    for finding in findings:
        checked = ["chain", *(["checkpoint"] if state is not None else [])]
        if not finding.faults and again is not None:
            checked.append(again.check(finding))
        what = f"invalid: {'; '.join(finding.faults)}" if finding.faults else f"valid ({', '.join(checked)})"
        print(f"{finding.name}: {what}", flush=True)
    return not any(finding.faults for finding in findings)


def _noted(run_dir: Path) -> dict[str, str]:
    """Return the hash of each certificate by request id, as the run noted it."""
    certified = [event for event in reading.events(run_dir) if event["kind"] == "request_certified"]
    return {str(event.get("request")): str(event.get("sha256")) for event in certified}


class _Again:
    """Trains all over what exact certificates claim, once for each set of requests that were served together."""

    def __init__(
        self, run_dir: Path, requests: list[ForgetRequest], served: list[str], trust: Trust | None = None
    ) -> None:
        self._trust = trust
        self._run_dir, self._requests, self._served = run_dir, requests, served
        self._hashes: dict[tuple[int, int], str] = {}

    def check(self, finding: Finding) -> str:
        """Compare the models with those of a new run, or return why that cannot be done."""
        content = finding.content
        together = [content["request"]["id"], *content["served_with"]]
        if not content["unlearner"].get("replays"):
            return "not an exact method: nothing to do again"
        if content["options"].get("recovery_rounds"):
            return "rounds followed at once: not done again"
        if content["versions"].get("torch") != torch.__version__:
            return f"made with torch {content['versions'].get('torch')}: not done again"
        cfg = launched(self._run_dir, self._trust).cfg
        if cfg["backend"]["name"] == "flower":
            return "its clients are devices: not done again"
        if not set(together) <= set(self._served):
            return "without a checkpoint that names the requests: not done again"
        gone = 1 + max(self._served.index(name) for name in together)
        if self._models(cfg, gone, content["server_round"]) != content["model"]["after"]:
            finding.faults.append("model.after: training all over gives other models")
        return "done again"

    def _models(self, cfg: Config, gone: int, until: int) -> str:
        """Return the hash after ``until`` rounds without what the first ``gone`` served requests name."""
        key = (gone, until)
        if key not in self._hashes:
            here: dict[str, Any] = {**cfg, "backend": {**cfg["backend"], "name": "inline", "state": "memory"}}
            setup = Setup.of(here)
            ids = set(self._served[:gone])
            forgotten = Forgotten([request for request in self._requests if request.id in ids])
            with (
                tempfile.TemporaryDirectory() as folder,
                open_backend(here, setup.dataset, setup.partition) as backend,
            ):
                state, _ = SimulatedReference(here, setup, backend, Path(folder)).run(forgotten, until)
            self._hashes[key] = model_digest(state["models"])
        return self._hashes[key]
