"""Reads how a run was started, to resume it: its settings, whether they have changed, and whose code it may run.

A folder is data that people send each other. Foreign code is imported only from where the user's command allows it: the
current directory, ``--config-dir``, or with ``--trust`` any place that the folder names.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedcl.config.compose import Config, compose, diff
from fedcl.config.instantiate import TRUSTED, targets_in
from fedcl.config.own_code import plugin_directories, plugin_packages
from fedcl.config.value_rules import ConfigError
from fedcl.results import reading, schema
from fedcl.results.environment import environment

_VERSIONS = ("fedcl", "torch", "flwr")  # what decides a run's bits
_PARTS = (
    "data", "scenario", "model", "learner", "strategy", "devices", "backend", "unlearner", "unlearning", "exclude",
    "client", "async", "evaluation", "checkpoint",
)  # fmt: skip


@dataclass(frozen=True)
class Trust:
    """What the user allows a folder: to import from ``config_dirs`` and the current directory, or ``everything``."""

    config_dirs: tuple[Path, ...] = ()
    everything: bool = False

    def refuse_foreign(self, cfg: Config, folder: Path, places: Sequence[str] = ()) -> None:
        """Refuse a configuration, found in ``folder``, that names foreign code or a cluster.

        Nothing is imported. ``places`` are where the folder says that such code was.

        Raises
        ------
        ConfigError
            With the options that would allow it.
        """
        if self.everything:
            return
        address = cfg["backend"].get("address")
        if address not in (None, "auto"):
            raise ConfigError(
                f"{folder}: backend.address={address}: processes there may run code here; to allow this: --trust"
            )
        wanted = {name.split(".")[0] for name in (*targets_in(cfg), *cfg["trusted_packages"])} - TRUSTED
        foreign = wanted - set(plugin_packages(wanted, plugin_directories(self.config_dirs, outside=[folder])))
        if foreign:
            lay = f" (it lay in {' or '.join(places)})" if places else ""
            raise ConfigError(
                f"{folder}: asks for code that is not fedcl's: {', '.join(sorted(foreign))}{lay}; if you know it, say "
                "where it is with --config-dir DIR, or add --trust to run what the folder names"
            )


@dataclass(frozen=True)
class Launched:
    """A run as its folder describes it: its configuration, and ``env.json`` with how it was started."""

    run_dir: Path
    cfg: Config
    env: dict[str, Any]
    trust: Trust

    @property
    def launch(self) -> dict[str, Any]:
        """How the run was started: ``overrides``, ``config_dirs``, ``plugin_paths``."""
        return {"overrides": [], "config_dirs": [], "plugin_paths": [], **(self.env.get("launch") or {})}

    @property
    def config_dirs(self) -> list[Path]:
        """The user's own configuration folders, as named when the run was started."""
        return [Path(folder) for folder in self.launch["config_dirs"]]

    def compose(self, overrides: Sequence[str], changes: Sequence[str] = ()) -> Config:
        """Compose a configuration from the folders that the run had; ConfigError also if it asks for foreign code."""
        cfg = compose(overrides, self.config_dirs, changes)
        self.trust.refuse_foreign(cfg, self.run_dir, self.launch["plugin_paths"])
        return cfg

    def refuse_changes(self) -> None:
        """Refuse a run if its settings, or the versions that decide its bits, have changed.

        Raises
        ------
        ConfigError
            With the differences, or with the file that was changed.
        """
        now = self.compose(self.launch["overrides"])
        # these depend on the current directory and on where the folder is
        now |= {key: self.cfg[key] for key in ("trusted_packages", "run_dir")}
        changes = diff(self.cfg, now)
        before, here = self.env.get("packages") or {}, environment(0, "cpu")["packages"]
        changes += [
            f"{name}: {before.get(name)} -> {here.get(name)}"
            for name in _VERSIONS
            if before.get(name) != here.get(name)
        ]
        if changes:
            raise ConfigError(
                f"{self.run_dir}: changed since the run began: {'; '.join(changes)}; --force resumes with the run's "
                "own settings"
            )
        self.refuse_damage()

    def refuse_damage(self) -> None:
        """Refuse a run whose files have been changed; ConfigError names the file."""
        for name in schema.LAUNCH:
            reading.content(self.run_dir / name)


def launched(run_dir: Path, trust: Trust | None = None, *, checked: bool = True, force: bool = False) -> Launched:
    """Read how a run was started.

    Without ``checked`` an edited ``config.yaml`` is accepted, for callers that report the changes; with ``force`` an
    edited ``env.json`` too.

    Raises
    ------
    ConfigError
        If a file is missing or damaged, or the run asks for code that the user has not allowed.
    """
    trust = trust or Trust()
    path = run_dir / schema.CONFIG
    cfg = reading.required(path, checked=checked)
    env = reading.environment(run_dir, checked=not force)
    if not env:
        raise reading.Damaged(run_dir / schema.ENV, "is missing")
    shaped = all(isinstance(cfg.get(part), dict) for part in _PARTS) and isinstance(cfg.get("seed"), int)
    names = cfg.get("trusted_packages")
    if not shaped or not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise reading.Damaged(path, "is not a run's configuration")
    found = Launched(run_dir, cfg, env, trust)
    trust.refuse_foreign(cfg, run_dir, found.launch["plugin_paths"])
    if trust.everything:
        sys.path += [folder for folder in found.launch["plugin_paths"] if folder not in sys.path]
    return found
