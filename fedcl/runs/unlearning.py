"""Assembling what processes the unlearning requests of a run, and what its certificates say of the run."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable
from pathlib import Path

import torch

from fedcl import __version__
from fedcl.assembly import make_queue, make_unlearner
from fedcl.client.unlearner_override import UnlearnerOverride
from fedcl.config.compose import Config, config_hash
from fedcl.config.instantiate import TARGET_KEY
from fedcl.config.value_rules import ConfigError
from fedcl.contracts.requests import ErasureOutcome
from fedcl.results import schema
from fedcl.runs.retrained import SimulatedEnsemble, SimulatedReference
from fedcl.runs.setup import Setup
from fedcl.runs.unlearning_metrics import SimulatedMetrics, marked
from fedcl.server.state import ServerData
from fedcl.simulation.backend import Backend
from fedcl.unlearning.certificate import About, Certification
from fedcl.unlearning.service import Certify, Unlearning, UnlearningOptions
from fedcl.unlearning.sources import RequestSource

_OPTIONS = ("in_flight", "recovery_rounds", "window", "reference")


def make_unlearning(
    cfg: Config,
    setup: Setup,
    backend: Backend,
    run_dir: Path,
    *sources: RequestSource,
    own: Config | None = None,
    certify: Certify | None = None,
) -> Unlearning:
    """Assemble what processes unlearning requests in a run.

    ``sources`` are those besides the configuration. ``own`` is the configuration of the run itself where ``cfg`` has
    another unlearner. ``certify`` takes note of processed requests.

    Raises
    ------
    ConfigError
        If the unlearner cannot process a planned request, or not on this backend, or ``unlearning.klom`` or
        ``unlearning.trigger`` cannot be measured.
    """
    settings, unlearner = cfg["unlearning"], make_unlearner(cfg)
    if settings["klom"] == 1:
        raise ConfigError("unlearning.klom=1: must be 0 or >= 2, as one model has no distribution")
    marked(setup.dataset, settings["trigger"])
    simulated = backend.states is not None
    queue = make_queue(cfg, setup.stream, setup.schedule, setup.dataset, *sources, retrains=simulated)
    if own is not None:
        unlearner = UnlearnerOverride(make_unlearner(own), unlearner)
    options = UnlearningOptions(settings["in_flight"], settings["recovery_rounds"], settings["reference"])
    if not simulated:
        return Unlearning(queue, unlearner, options, certify=certify)
    cache = Path(settings["cache"]) if settings["cache"] else run_dir / "references"
    metrics = SimulatedMetrics(
        cfg, setup, SimulatedEnsemble(cfg, setup, cache, settings["klom"], settings["references"])
    )
    return Unlearning(
        queue,
        unlearner,
        options,
        reference=SimulatedReference(cfg, setup, backend, cache),
        measure=metrics.measure,
        revival=metrics.revival,
        certify=certify,
    )


def make_certification(cfg: Config, own: Config, run_dir: Path, save: Callable[[ServerData], None]) -> Certification:
    """Assemble what certifies processed requests.

    ``own`` is the configuration of the run, ``cfg`` the one by which requests are processed. ``save`` writes a
    checkpoint and deletes those before it.
    """
    node = dict(cfg["unlearner"])
    about = About(
        unlearner={
            "name": str(node.pop(TARGET_KEY)),
            "parameters": node,
            "retrains": make_unlearner(cfg).retrains,
        },
        options={name: cfg["unlearning"][name] for name in _OPTIONS},
        run={"seed": cfg["seed"], "config_sha256": config_hash(own)},
        versions={"fedcl": __version__, "torch": torch.__version__},
        files=_files(cfg),
    )
    return Certification(run_dir, about, save, functools.partial(purge, cfg, run_dir))


def purge(cfg: Config, run_dir: Path, server: ServerData) -> None:
    """Remove what the run's folder holds of trainings that knew what is forgotten by now."""
    unlearning = server.unlearning
    assert isinstance(unlearning, Unlearning)
    if not unlearning.forgotten.requests:
        return
    if isinstance(unlearning.reference, SimulatedReference) and cfg["unlearning"]["cache"] is None:
        unlearning.reference.prune(unlearning.forgotten, server.state.next_round)
    reference = run_dir / schema.REFERENCE
    if (reference / schema.SUMMARY).is_file():  # done: its numbers stay, it needs no more
        for name in ("checkpoints", "clients", "references"):
            shutil.rmtree(reference / name, ignore_errors=True)


def _files(cfg: Config) -> list[ErasureOutcome]:
    """Return what becomes of the files that a run writes besides its certificates."""
    checkpoints = ErasureOutcome("checkpoints", "not applicable", "the run keeps none")
    if cfg["checkpoint"]["every"]:
        checkpoints = ErasureOutcome("checkpoints", "erased", "one is written now, those before it are deleted")
    references = ErasureOutcome("references", "erased", "those that knew the forget set are deleted")
    if cfg["unlearning"]["cache"]:
        why = "unlearning.cache is shared with other runs, and not emptied"
        references = ErasureOutcome("references", "retained", why)
    return [checkpoints, references]
