from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from fedcl.config.compose import compose
from fedcl.results import load
from fedcl.runs.experiment import run

SMALL = ["backend=inline", "compare_with=null", "figures=false", "num_clients=4", "scenario.num_tasks=2"]
SMALL += ["rounds_per_task=2", "data/partition=iid", "checkpoint.min_seconds=0", "strategy/projection=none"]
SMALL += ["unlearner=continue_without", "unlearning.reference=false", "scenario=class_incremental"]

Asked = Callable[..., Path]


@pytest.fixture
def run_small(tmp_path: Path) -> Asked:
    """Return a function that plays a small run with some requests planned, and returns its folder."""

    def asked(name: str, *overrides: str, requests: str = "", config_dirs: Sequence[Path] = ()) -> Path:
        settings = [*SMALL, *overrides, f"unlearning.requests=[{requests}]", f"run_dir={tmp_path / name}"]
        return run(compose(settings, config_dirs), settings, config_dirs, quiet=True)

    return asked


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that is over, with a learner that remembers samples; it served one client at its second task."""
    folder = tmp_path_factory.mktemp("over") / "run"
    request = "{id: first, scope: client, clients: [3], at: {round: 2}}"
    settings = [*SMALL, "learner=er", "unlearner=retrain", f"unlearning.requests=[{request}]", f"run_dir={folder}"]
    return run(compose(settings), settings, [], quiet=True)


@pytest.fixture
def finished(finished_run: Path, tmp_path: Path) -> Path:
    """A copy of that run."""
    return Path(shutil.copytree(finished_run, tmp_path / "finished"))


@pytest.fixture(scope="session")
def events_of() -> Callable[..., list[dict[str, Any]]]:
    """Return a function giving a run's events of some kind, each as a mapping without what it has not."""

    def events(folder: Path, *kinds: str) -> list[dict[str, Any]]:
        rows = load(folder).events
        return [row.dropna().to_dict() for _, row in rows[rows["kind"].isin(kinds)].iterrows()]

    return events
