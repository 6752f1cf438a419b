"""Every unlearner keeps the contract: it serves each scope it declares, changes nothing unasked, and survives a stop.

Choices are discovered: a new YAML is covered without a line here.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from fedcl.assembly import make_unlearner
from fedcl.base.tree import equal
from fedcl.config.compose import list_choices
from fedcl.contracts.requests import NAMES, Scope
from tests.toy import ALONG, PARTS, Choices, Diary, configure, run_toy, write_files

UNLEARNERS = [name for name, _ in list_choices("unlearner")]
ASKED: dict[Scope, str] = {
    "client": "{{id: a, scope: client, clients: ['3'], at: {{round: {at}}}}}",
    "class": "{{id: a, scope: class, classes: [1], at: {{round: {at}}}}}",
    "sample": "{{id: a, scope: sample, samples: [0, 1, 2, 3, 6, 7], at: {{round: {at}}}}}",
    "task": "{{id: a, scope: task, tasks: [0], at: {{round: {at}}}}}",
}
AT = 3  # of six rounds: the second task's last
SCOPES = [(name, scope) for name in UNLEARNERS for scope in NAMES]
QUICK = [s if s[1] == "client" or s[0] == "cdp" else pytest.param(*s, marks=pytest.mark.slow) for s in SCOPES]


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return write_files(tmp_path_factory.mktemp("toy"))


def asking(
    unlearner: str,
    scope: Scope,
    files: dict[str, str],
    cache: Path,
    choices: Choices | None = None,
    *extra: str,
    at: int = AT,
) -> dict[str, Any]:
    """Return the toy's configuration with one request, or skip where the unlearner does not serve it."""
    request = ASKED[scope].format(at=at)
    cfg = configure(
        {**(choices or {}), "unlearner": unlearner},
        files,
        torch.device("cpu"),
        f"unlearning.requests=[{request}]",
        f"unlearning.cache={cache}",
        *extra,
    )
    if scope not in make_unlearner(cfg).scopes:
        pytest.skip(f"{unlearner} does not serve requests of scope {scope}")
    return cfg


def kinds(diary: Diary) -> list[str]:
    return [event["kind"] for event in diary.events if event["kind"].startswith("request")]


@pytest.mark.parametrize(("unlearner", "scope"), QUICK)
def test_serves_what_it_declares(unlearner: str, scope: Scope, files: dict[str, str], tmp_path: Path) -> None:
    whole = run_toy(asking(unlearner, scope, files, tmp_path))
    assert kinds(whole) == ["request_admitted", "request_served"]
    assert whole.faults == []
    assert len(whole.hashes) == whole.rounds == 6
    trained = {row["client"] for row in whole.rows if row["phase"] == "train" and row["round"] >= AT}
    assert ("3" in trained) is (scope != "client")


@pytest.mark.slow
@pytest.mark.parametrize(("unlearner", "scope"), [s for s in SCOPES if s[1] == "client" or s[0] == "cdp"])
def test_serves_once_however_often_the_run_stops(
    unlearner: str, scope: Scope, files: dict[str, str], tmp_path: Path
) -> None:
    whole = run_toy(asking(unlearner, scope, files, tmp_path))
    rest = run_toy(asking(unlearner, scope, files, tmp_path), start=whole.saved[2])  # stopped before the request came
    assert rest.hashes == whole.hashes[2:]
    assert equal(rest.saved[-1], whole.saved[-1])
    late = run_toy(asking(unlearner, scope, files, tmp_path), start=whole.saved[AT + 1])
    assert kinds(late) == []  # served once
    assert late.hashes == whole.hashes[AT + 1 :]


@pytest.mark.parametrize(
    "unlearner",
    # those that see every round might; the others are not even called
    [u if u in ("retrain", "federaser", "sifu") else pytest.param(u, marks=pytest.mark.slow) for u in UNLEARNERS],
)
def test_changes_nothing_before_it_is_asked(unlearner: str, files: dict[str, str], tmp_path: Path) -> None:
    scope = next(s for s in NAMES if s in make_unlearner(configure({"unlearner": unlearner}, files, CPU)).scopes)
    plain = run_toy(configure(ALONG.get(f"unlearner={unlearner}", {}), files, CPU), until=AT - 1)
    asked = run_toy(asking(unlearner, scope, files, tmp_path), until=AT - 1)
    assert asked.hashes == plain.hashes
    assert asked.rows == plain.rows


CPU = torch.device("cpu")
# one of each kind of state that a request must get along with
COMPANY: list[Choices] = [
    {"strategy/collaboration": "fedcac"},
    {"strategy/projection": "fot"},
    {"strategy/optimizer": "adam"},
    {"learner": "er"},
    {"scenario": "task_incremental"},
    {"scenario/schedule": "asynchronous"},
]


@pytest.mark.slow
@pytest.mark.parametrize("company", COMPANY, ids=lambda choices: "-".join(choices.values()))
@pytest.mark.parametrize("unlearner", UNLEARNERS)
def test_gets_along(unlearner: str, company: Choices, files: dict[str, str], tmp_path: Path) -> None:
    cfg = configure(ALONG.get(f"unlearner={unlearner}", {}) | {"unlearner": unlearner}, files, CPU)
    # half of the pairs with a client that leaves, half with a class, where both are served
    scope: Scope = "client" if (UNLEARNERS.index(unlearner) + COMPANY.index(company)) % 2 else "class"
    if scope not in make_unlearner(cfg).scopes:
        scope = "class" if scope == "client" else "client"
    if ALONG.get(f"unlearner={unlearner}", {}).keys() & company.keys():
        pytest.skip(f"{unlearner} serves no such run")
    cfg = asking(unlearner, scope, files, tmp_path, company)
    whole = run_toy(cfg)
    assert kinds(whole) == ["request_admitted", "request_served"]
    # where clients are in tasks of their own, a round may have been that of the one who left
    assert {fault["kind"] for fault in whole.faults} <= ({"round_skipped"} if "scenario/schedule" in company else set())
    assert all(math.isfinite(row["value"]) for row in whole.rows if row["phase"] == "test")


@pytest.mark.parametrize("scope", list(NAMES))
@pytest.mark.parametrize(
    "company",
    [
        {},
        pytest.param({"strategy/collaboration": "fedcac"}, marks=pytest.mark.slow),
        pytest.param({"learner": "er"}, marks=pytest.mark.slow),
        pytest.param({"strategy/projection": "fot"}, marks=pytest.mark.slow),
    ],
    ids=["fedavg", "fedcac", "er", "fot"],
)
def test_retraining_is_a_run_that_never_had_it(
    scope: Scope, company: Choices, files: dict[str, str], tmp_path: Path
) -> None:
    """Bit for bit, rounds after the request included."""
    asked = run_toy(asking("retrain", scope, files, tmp_path, company))
    never = run_toy(asking("retrain", scope, files, tmp_path, company, at=0))
    assert asked.hashes[AT:] == never.hashes[AT:]
    if scope in ("client", "class", "sample"):
        key, named = NAMES[scope], {"client": "['3']", "class": "[1]", "sample": "[0,1,2,3,6,7]"}[scope]
        excluded = run_toy(configure(company, files, CPU, f"exclude.{key}={named}"))
        assert asked.hashes[AT:] == excluded.hashes[AT:]


def test_late_clients_and_a_request(files: dict[str, str], tmp_path: Path) -> None:
    """What is under way from an older model is refused or moved, and the one who left is heard no more."""
    late = ["async.buffer=2", "devices=trace", f"devices.path={files['trace']}", "evaluation.every=0"]
    results = {}
    for policy in ("drop", "rebase"):
        extra = [*late, f"unlearning.in_flight={policy}"]
        diary = run_toy(asking("retrain", "client", files, tmp_path / "a", {}, *extra))
        assert kinds(diary) == ["request_admitted", "request_served"]
        results[policy] = diary.hashes
    assert len(results["drop"]) == len(results["rebase"]) == 6


def test_every_part_is_in_the_company() -> None:
    assert {group for choices in COMPANY for group in choices} >= set(PARTS) - {"strategy/staleness"}
