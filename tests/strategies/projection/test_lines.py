"""LiNeS at the server: what a task has changed is scaled, layer by layer, where the task ends."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from fedcl.contracts.requests import ForgetRequest
from fedcl.contracts.strategy import GLOBAL, Event
from fedcl.models.flat import FlatModel
from fedcl.models.merge import layer_factors
from fedcl.models.networks import MLP
from strategies.projection.lines import LiNeS
from tests.toy import configure, run_toy, write_files

# hidden.0 2, hidden.1 2, head 2 elements; factors 0.2, 0.6, 1
SPEC = FlatModel(MLP(input_shape=(1,), heads=(1,), hidden=(1, 1))).spec
ENDED = Event("task_end", 0, 3, False)


def view(**models: Tensor) -> Any:
    held = {GLOBAL: torch.zeros(6), **models}
    return SimpleNamespace(held=held, model_at=lambda target: held.get(target, held[GLOBAL]))


def part(**settings: Any) -> LiNeS:
    made = LiNeS(**{"shallow": 0.2, **settings})
    made.setup(SPEC)
    return made


def change(made: LiNeS, server: Any, target: str, by: float) -> None:
    passed = made.apply(target, torch.full((6,), by, dtype=torch.float64), server)
    server.held[target] = server.model_at(target) + passed.float()


def test_the_change_since_the_task_began_is_scaled() -> None:
    made, server = part(first_task=True), view(a=torch.ones(6))
    for target, by in ((GLOBAL, 2.0), ("a", -1.0), (GLOBAL, 3.0)):
        change(made, server, target, by)
    assert made.finalize(Event("round_end", 0, 2, False), server) == {}
    resumed = part(first_task=True)
    resumed.load_state_dict(made.state_dict())
    replaced = resumed.finalize(ENDED, server)
    assert set(replaced) == {GLOBAL, "a"}
    assert replaced[GLOBAL].dtype == torch.float32
    assert replaced[GLOBAL].tolist() == pytest.approx([1.0, 1.0, 3.0, 3.0, 5.0, 5.0])
    assert replaced["a"].tolist() == pytest.approx([0.8, 0.8, 0.4, 0.4, 0.0, 0.0])
    # the next task begins there
    server.held.update(replaced)
    change(resumed, server, GLOBAL, 1.0)
    assert resumed.finalize(ENDED, server)[GLOBAL].tolist() == pytest.approx([1.2, 1.2, 3.6, 3.6, 6.0, 6.0])


def test_the_first_task_of_an_untrained_model_is_let_be() -> None:
    made, server = part(), view()
    change(made, server, GLOBAL, 2.0)
    assert made.finalize(ENDED, server) == {}
    change(made, server, GLOBAL, 1.0)
    assert made.finalize(ENDED, server)[GLOBAL].tolist() == pytest.approx([2.2, 2.2, 2.6, 2.6, 3.0, 3.0])


def test_forgetting_begins_the_task_again() -> None:
    made, server = part(first_task=True), view()
    request = ForgetRequest("r", "client", clients=("2",))
    assert made.forget(request).outcome == "not applicable"
    change(made, server, GLOBAL, 2.0)
    assert made.forget(request).outcome == "reset"
    change(made, server, GLOBAL, 1.0)
    assert made.finalize(ENDED, server)[GLOBAL].tolist() == pytest.approx([2.2, 2.2, 2.6, 2.6, 3.0, 3.0])


def test_a_whole_run(tmp_path: Path, device: torch.device) -> None:
    choices, files = {"strategy/projection": "lines"}, write_files(tmp_path)

    def ends(*settings: str) -> list[Tensor]:
        diary = run_toy(configure(choices, files, device, *settings, num_tasks=2))
        return [state["server"]["models"][GLOBAL] for state in diary.saved]

    scaled = ends("strategy.projection.server.shallow=0.25")
    plain = ends("strategy.projection.server.shallow=1")
    assert all(torch.equal(a, b) for a, b in zip(scaled[:4], plain[:4], strict=True))
    spec = FlatModel(MLP(input_shape=(1, 16, 16), heads=(6,), hidden=(8,))).spec
    expected = plain[2] + layer_factors(spec, 0.25) * (plain[4] - plain[2])
    torch.testing.assert_close(scaled[4], expected)
