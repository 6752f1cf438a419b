"""What a client sends is data, all of it: whatever it is, it costs that client's reply and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from fedcl.base.tree import equal
from fedcl.config.compose import list_choices
from fedcl.simulation import backend
from tests.faults.spoiling import BAD, Spoiling
from tests.toy import PARTS, Choices, Diary, configure, label, missing, run_toy, write_files

GROUPS = (*PARTS, "strategy", "learner", "unlearner")
EVERY: list[Choices] = [{group: choice} for group in GROUPS for choice, _ in list_choices(group)]
# all that clients upload and are asked for, a few methods at a time
AGGREGATED = ("learner.ewc.aggregate=true", "learner.ewc.mode=separate")
TOGETHER: list[tuple[Choices, tuple[str, ...]]] = [
    ({"strategy/collaboration": "scaffold", "strategy/projection": "fot", "learner": "ewc"}, AGGREGATED),
    ({"strategy/collaboration": "qfedavg", "learner": "ranpac", "unlearner": "ssd"}, ()),
    ({"strategy/collaboration": "ifca", "learner": "nmc", "unlearner": "neggrad_plus"}, ()),
    ({"strategy/collaboration": "fedcac", "unlearner": "cdp"}, ("strategy.collaboration.server.masks=client",)),
]
REQUEST = "unlearning.requests=[{scope: class, classes: [0], at: {task: 1}}]"
CLIENT = "unlearning.requests=[{scope: client, clients: ['3'], at: {task: 1}}]"
SMALL = ("client.epochs=1", "evaluation.personal=true", "evaluation.iterations=2", "unlearning.reference=false")
HYPOTHESIS = settings(
    derandomize=True,
    deadline=None,
    database=None,
    phases=[Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return write_files(tmp_path_factory.mktemp("toy"))


def configured(choices: Choices, files: dict[str, str], device: torch.device, *extra: str) -> dict[str, Any]:
    request = []
    if "unlearner" in choices:
        from fedcl.assembly import make_unlearner

        cfg = configure(choices, files, device, *SMALL, *extra, num_tasks=2)
        # the reference is retrained once, by the run that spoils nothing
        cache = Path(files["npz"]).parent / "references"
        request = [REQUEST if "class" in make_unlearner(cfg).scopes else CLIENT, f"unlearning.cache={cache}"]
    return configure(choices, files, device, *SMALL, *request, *extra, num_tasks=2)


def played(cfg: dict[str, Any], seed: int | None, *, wire: bool = False) -> tuple[Diary, list[tuple[str, str]]]:
    """Play a run in which BAD's replies are spoiled, or lost without a seed; return also (kind, field) of each."""
    hosts: list[Spoiling] = []

    def host(*args: Any) -> Spoiling:
        hosts.append(Spoiling(*args, seed=seed, wire=wire))
        return hosts[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backend, "ClientHost", host)
        diary = run_toy(cfg, watch=False, cohorts=not wire)
    return diary, hosts[0].spoiled


def assert_costs_that_client_only(cfg: dict[str, Any], seed: int, lost: Diary, *, wire: bool) -> list[tuple[str, str]]:
    diary, spoiled = played(cfg, seed, wire=wire)
    assert len(diary.hashes) == diary.rounds
    assert diary.hashes == lost.hashes
    for state, other in zip(diary.saved, lost.saved, strict=True):
        assert equal(state["server"]["models"], other["server"]["models"])
        assert equal(state["server"]["strategy"], other["server"]["strategy"])
        assert equal(state["server"]["statistics"], other["server"]["statistics"])
        assert equal(state["clients"], other["clients"])
    faults = [event for event in diary.events if event["kind"] in ("reply_rejected", "client_failed")]
    assert [(e["client"], e["message"]) for e in faults] == [(BAD, kind) for kind, _ in spoiled]
    for event, (_, named) in zip(faults, spoiled, strict=True):
        assert event["round"] >= 0
        assert event["reason"].isprintable()
        assert len(event["reason"]) <= 500
        assert event["kind"] == "client_failed" or named in event["reason"]
    return spoiled


@pytest.mark.parametrize("choices", TOGETHER, ids=lambda choices: label(choices[0]))
def test_no_field_of_a_reply_costs_more_than_the_reply(
    choices: tuple[Choices, tuple[str, ...]], files: dict[str, str], device: torch.device
) -> None:
    cfg = configured(choices[0], files, device, *choices[1])
    lost = played(cfg, None)[0]

    @settings(HYPOTHESIS, max_examples=1)
    @given(seed=st.integers(0, 2**32))
    def check(seed: int) -> None:
        for wire in (False, True):
            assert_costs_that_client_only(cfg, seed, lost, wire=wire)

    check()


@pytest.mark.slow
@pytest.mark.parametrize("choices", EVERY, ids=label)
def test_no_field_of_any_method_costs_more_than_the_reply(
    choices: Choices, files: dict[str, str], device: torch.device
) -> None:
    if why := missing(label(choices)):
        pytest.skip(why)
    cfg = configured(choices, files, device)
    lost = played(cfg, None)[0]

    @settings(HYPOTHESIS, max_examples=6)
    @given(seed=st.integers(0, 2**32), wire=st.booleans())
    def check(seed: int, wire: bool) -> None:
        assert_costs_that_client_only(cfg, seed, lost, wire=wire)

    check()
