"""Every kind of part at once: FedCAC, FOT, gradient inversion and EWC on devices that are late."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
from torch import Tensor

from fedcl.config.compose import compose
from fedcl.contracts.strategy import Update
from fedcl.runs.setup import Setup, make_server
from fedcl.server.strategy import Pipeline
from fedcl.simulation.backend import open_backend
from tests.toy import Diary

PARTS = [
    "strategy/collaboration=fedcac", "strategy/projection=fot", "strategy/staleness=gradient_inversion", "learner=ewc",
    "devices=lognormal", "scenario=task_incremental",
]  # fmt: skip
SMALL = [
    *PARTS, "backend=inline", "compare_with=null", "figures=false", "num_clients=13",
    "rounds_per_task=[20,30]", "scenario.num_tasks=2", "async.buffer=1", "devices.sigma=1.0", "model.hidden=[24,16]",
    "strategy.staleness.server.iterations=4", "strategy.staleness.server.patience=5", "evaluation.every=0",
    "evaluation.personal=false", "strategy.projection.server.epsilon=0.6",
]  # fmt: skip


@dataclass
class Watched:
    """Notes, for each change of a model after the first task, the update's age and how much of it FOT forbids."""

    pipeline: Pipeline
    leaks: dict[int, list[float]] = field(default_factory=dict)
    targets: set[str] = field(default_factory=set)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.pipeline, name)

    def aggregate(self, positions: Sequence[Update | None], view: Any, running: None = None) -> dict[str, Tensor]:
        changed = self.pipeline.aggregate(positions, view)
        bases = self.pipeline.projection.state_dict()["bases"]
        for target, model in changed.items():
            change = model.double() - view.model_at(target).double()
            inside = 0.0
            for layer, basis_DK in bases.items():
                tensor = view.spec[f"{layer}.weight"]
                rows = change[tensor.start : tensor.stop].view(tensor.shape[0], -1)
                inside += float((rows @ basis_DK.double()).square().sum())
            if bases and float(change.norm()) > 0:
                self.targets.add(target)
                for update in positions:
                    if update is not None:
                        self.leaks.setdefault(update.age, []).append(inside**0.5 / float(change.norm()))
        return changed


def test_the_experiment_is_made_of_these_parts() -> None:
    ours = compose(["experiment=everything", *PARTS])
    assert ours == compose(["experiment=everything"])


@pytest.fixture(scope="module")
def played() -> tuple[Watched, Diary]:
    cfg = compose(SMALL)
    setup, diary = Setup.of(cfg), Diary()
    recorder: Any = diary
    with open_backend(cfg, setup.dataset, setup.partition) as backend:
        server = make_server(cfg, setup, backend, recorder)
        assert isinstance(server.strategy, Pipeline)
        watched: Any = Watched(server.strategy)
        server.strategy = watched
        server.run(lambda server_round: None)
    return watched, diary


def test_changes_of_every_model_are_orthogonal_to_the_basis_at_every_age(played: tuple[Watched, Diary]) -> None:
    watched, _ = played
    assert {0, 1, 10} <= set(watched.leaks)
    assert len(watched.targets) > 5  # personal models among them
    worst = {age: max(shares) for age, shares in watched.leaks.items()}
    assert max(worst.values()) < 1e-5, worst


def test_late_updates_were_corrected_and_nothing_failed(played: tuple[Watched, Diary]) -> None:
    _, diary = played
    assert diary.faults == []
    rows = {row["name"]: row["value"] for row in diary.rows if row["phase"] == "server"}
    assert rows["collaboration/critical_share"] > 0
    assert any(name.startswith("staleness/") for name in rows)
    assert max(row["value"] for row in diary.rows if row["name"] == "age") >= 10
    assert [row for row in diary.rows if row["name"] == "accuracy_stale"]
