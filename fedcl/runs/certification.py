"""What follows requests that were served: certificates, a checkpoint that stays alone, the end of older memories."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import torch

from fedcl import __version__
from fedcl.config.compose import Config, config_hash
from fedcl.config.instantiate import TARGET_KEY
from fedcl.contracts.requests import ErasureOutcome
from fedcl.results import schema
from fedcl.results.recorder import Recorder
from fedcl.runs.retrained import SimulatedReference
from fedcl.server.state import ServerData
from fedcl.unlearning import certificate
from fedcl.unlearning.receipt import Receipt
from fedcl.unlearning.service import Unlearning

_OPTIONS = ("in_flight", "recovery_rounds", "window", "reference")


class AfterServing:
    """Takes note of requests that were served, so that a kill at any moment leaves each of them served once.

    Certificates come first, under names that are the same when they are written again; then the checkpoint, from which
    on the requests are served; then what a killed run may leave: the next call, or :meth:`purge`, removes it. ``run``
    is the configuration that the run has, ``cfg`` the one that requests are served by.
    """

    def __init__(
        self,
        cfg: Config,
        run: Config,
        run_dir: Path,
        server: ServerData,
        unlearning: Unlearning,
        recorder: Recorder,
        save_alone: Callable[[], None],
    ) -> None:
        self._cfg, self._run, self._run_dir = cfg, run, run_dir
        self._server, self._unlearning = server, unlearning
        self._recorder, self._save_alone = recorder, save_alone

    def __call__(self, receipt: Receipt) -> None:
        """Certify, save, purge."""
        for path, request in zip(
            certificate.write(self._run_dir, receipt, self._about(), self._kept()), receipt.requests, strict=True
        ):
            self._recorder.event(
                "request_certified",
                round=receipt.server_round,
                virtual_time=self._server.now,
                request=request.id,
                certificate=path.name,
                sha256=certificate.recorded(path),
            )
        self._save_alone()
        self.purge()

    def purge(self) -> None:
        """Remove what the run's folder holds of trainings that knew what is forgotten by now."""
        forgotten, replay = self._unlearning.forgotten, self._unlearning.replay
        if not forgotten.requests:
            return
        if isinstance(replay, SimulatedReference) and self._cfg["unlearning"]["cache"] is None:
            replay.prune(forgotten, self._server.state.next_round)
        reference = self._run_dir / schema.REFERENCE
        if (reference / schema.SUMMARY).is_file():  # done: its numbers stay, it needs no more
            for name in ("checkpoints", "clients", "references"):
                shutil.rmtree(reference / name, ignore_errors=True)

    def _kept(self) -> list[ErasureOutcome]:
        """Return what becomes of the files that a run writes besides."""
        cache, every = self._cfg["unlearning"]["cache"], self._cfg["checkpoint"]["every"]
        shared = ErasureOutcome("references", "remains", "unlearning.cache is shared with other runs, and not emptied")
        return [
            ErasureOutcome("checkpoints", "erased", "one is written now, those before it are deleted")
            if every
            else ErasureOutcome("checkpoints", "none", "the run keeps none"),
            shared if cache else ErasureOutcome("references", "erased", "those that knew the forget set are deleted"),
        ]

    def _about(self) -> certificate.About:
        cfg, node = self._cfg, dict(self._cfg["unlearner"])
        return certificate.About(
            unlearner={
                "name": str(node.pop(TARGET_KEY)),
                "parameters": node,
                "replays": self._unlearning.unlearner.replays,
            },
            options={name: cfg["unlearning"][name] for name in _OPTIONS},
            run={"seed": cfg["seed"], "config_sha256": config_hash(self._run)},
            versions={"fedcl": __version__, "torch": torch.__version__},
        )
