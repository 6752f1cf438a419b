"""What server parts still hold of a client that has left, next to a run in which it never was.

A part may say ``erased`` or ``none`` only where its state is, bit for bit, that of the run without the client.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fedcl.base.tree import clone, equal
from fedcl.config.compose import list_choices
from fedcl.contracts.requests import ErasureOutcome, ForgetRequest
from fedcl.server.strategy import Pipeline
from tests.toy import FITS, PARTS, Diary, Enough, configure, missing, run_toy, write_files

CPU = torch.device("cpu")
AT = 2  # a task has ended by then
LATE = ["async.buffer=2", "devices=trace"]
CASES = [(group, name) for group in PARTS for name, _ in list_choices(group)]
CLIENT = f"{{id: a, scope: client, clients: ['3'], at: {{round: {AT}}}}}"
CLASS = f"{{id: a, scope: class, classes: [1], at: {{round: {AT}}}}}"
HONEST = {"retained", "reset", "recomputed"}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return write_files(tmp_path_factory.mktemp("toy"))


def settings(group: str, name: str, files: dict[str, str], *extra: str) -> dict[str, Any]:
    late = [*LATE, *(text.format(**files) for text in FITS["devices=trace"])] if group.endswith("staleness") else []
    return configure({group: name, "unlearner": "continue_without"}, files, CPU, "evaluation.every=0", *late, *extra)


def after_forgetting(
    cfg: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> tuple[dict[str, Any], dict[str, ErasureOutcome]]:
    """Return the parts' states right after they have forgotten, and what they said."""
    states: dict[str, Any] = {}
    said: dict[str, ErasureOutcome] = {}
    forget = Pipeline.forget

    def forget_and_stop(self: Pipeline, request: ForgetRequest) -> list[ErasureOutcome]:
        outcomes = forget(self, request)
        states.update({role: clone(part.state_dict()) for role, part in self.parts.items()})
        said.update(zip(self.parts, outcomes, strict=True))
        raise Enough

    monkeypatch.setattr(Pipeline, "forget", forget_and_stop)
    run_toy(cfg)
    assert said
    return states, said


def judge(
    group: str, name: str, files: dict[str, str], scope: tuple[str, str], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[bool, ErasureOutcome]:
    """Return whether the part's state differs from that of a run without the forget set, and its answer."""
    if (why := missing(f"{group}={name}")) is not None:
        pytest.skip(why)
    request, excluded = scope
    asking = [f"unlearning.requests=[{request}]", f"unlearning.cache={folder}", "unlearning.reference=false"]
    states, said = after_forgetting(settings(group, name, files, *asking), monkeypatch)
    role = group.rpartition("/")[2]
    state, residual = states[role], said[role]
    if not state:
        return False, residual
    never: Diary = run_toy(settings(group, name, files, excluded), until=AT - 1)
    differs = not equal(state, never.saved[AT]["server"]["strategy"][role])
    print(f"{group}={name}: {residual.outcome}{' (state differs)' if differs else ''}: {residual.why}")
    return differs, residual


QUICK = {"fedcac", "fot", "adam"}


@pytest.mark.parametrize(
    ("group", "name"),
    [case if case[1] in QUICK else pytest.param(*case, marks=pytest.mark.slow) for case in CASES],
    ids=[f"{g.rpartition('/')[2]}-{n}" for g, n in CASES],
)
def test_what_a_part_keeps_of_a_client_it_owns_up_to(
    group: str, name: str, files: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    differs, residual = judge(group, name, files, (CLIENT, "exclude.clients=['3']"), tmp_path, monkeypatch)
    assert residual.outcome in HONEST or not differs, residual


@pytest.mark.slow
@pytest.mark.parametrize(("group", "name"), CASES, ids=[f"{g.rpartition('/')[2]}-{n}" for g, n in CASES])
def test_what_a_part_keeps_of_a_class_it_owns_up_to(
    group: str, name: str, files: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    differs, residual = judge(group, name, files, (CLASS, "exclude.classes=[1]"), tmp_path, monkeypatch)
    assert residual.outcome in HONEST or not differs, residual
