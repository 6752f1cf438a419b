"""When requests come, in what company, and what becomes of the messages that are under way then."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedcl.config.compose import ConfigError, compose
from fedcl.contracts.requests import ForgetRequest
from fedcl.results import load
from fedcl.results.checkpoint import Checkpoints
from fedcl.runs.verify import verify
from fedcl.server.loop import Server
from fedcl.unlearning.sources import submit

RunExperiment = Callable[..., Path]
Events = Callable[..., list[dict[str, Any]]]
Hash = Callable[[Path], str]

HALVES = '''
from collections.abc import Mapping, Sequence

from fedcl.contracts.unlearner import Unlearner


class Halves(Unlearner):
    """Halves every model: an edit that is easily seen."""

    def unlearn(self, requests, models, view):
        return {target: model / 2 for target, model in models.items()}
'''


@pytest.fixture
def halves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a --config-dir with the unlearner ``halves``."""
    folder = tmp_path / "mine"
    (folder / "unlearner").mkdir(parents=True)
    (folder / "halves.py").write_text(HALVES)
    (folder / "unlearner" / "halves.yaml").write_text("# Halves.\n_target_: halves.Halves\n")
    sys.modules.pop("halves", None)  # of an earlier test's folder
    monkeypatch.syspath_prepend(str(folder))
    return folder


def _certificates(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted((folder / "certificates").glob("*.json"))]


def _trained(folder: Path, since: int) -> set[str]:
    table = load(folder).metrics
    rows = table[(table["phase"] == "train") & (table["name"] == "num_examples") & (table["round"] >= since)]
    return set(rows[rows["value"] > 0]["client"])


@pytest.mark.parametrize(
    ("request_", "excluded", "trained"),
    [
        ("{id: a, scope: client, clients: [3], at: {round: 0}}", "exclude.clients=[3]", {"0", "1", "2"}),
        pytest.param(
            "{id: a, scope: class, classes: [2], at: {round: 0}}",
            "exclude.classes=[2]",
            {"0", "1", "2", "3"},
            marks=pytest.mark.slow,
        ),
    ],
    ids=["client", "class"],
)
def test_before_anything_was_learned(request_: str, excluded: str, trained: set[str], run_small: RunExperiment) -> None:
    """The one who leaves before the first round was never there, and nobody's buffer lacks a task for being told."""
    settings = ("learner=er", "learner.er.budget=40")
    asked = run_small("a", *settings, requests=request_)
    assert _trained(asked, 0) == trained
    assert [c["server_round"] for c in _certificates(asked)] == [0]
    assert verify(asked)
    never = run_small("b", *settings, excluded)
    model = [Checkpoints(folder).load()[0]["server"]["models"]["*"] for folder in (asked, never)]
    assert model[0].equal(model[1])


def test_at_the_very_end(run_small: RunExperiment) -> None:
    folder = run_small("a", "unlearner=retrain", requests="{id: a, scope: client, clients: [3], at: end}")
    [certificate] = _certificates(folder)
    state = Checkpoints(folder).load()[0]["server"]
    assert certificate["server_round"] == state["next_round"] == 4
    assert load(folder).status == "done"
    assert verify(folder)


def test_two_in_one_window_are_served_together(run_small: RunExperiment, events_of: Events) -> None:
    requests = (
        "{id: a, scope: client, clients: [3], at: {round: 1}}, {id: b, scope: class, classes: [0], at: {round: 2}}"
    )
    folder = run_small("a", "unlearning.window=2", "unlearner=retrain", requests=requests)
    [served] = events_of(folder, "request_served")
    assert (served["round"], served["requests"]) == (3, ["a", "b"])
    assert [(c["index"], c["request"]["id"], c["processed_with"]) for c in _certificates(folder)] == [
        (1, "a", ["b"]),
        (2, "b", ["a"]),
    ]
    assert "3" not in _trained(folder, 1)  # admitted is left out, though not served yet
    assert verify(folder)


def test_requests_that_contradict_each_other(run_small: RunExperiment, events_of: Events) -> None:
    requests = ", ".join(
        [
            "{id: a, scope: client, clients: [3], at: {round: 1}}",
            "{id: twice, scope: client, clients: [3], at: {round: 2}}",
            "{id: his, scope: sample, samples: [1], clients: [3], at: {round: 2}}",
            "{id: most, scope: client, clients: [0, 1], at: {round: 2}}",
            "{id: last, scope: client, clients: [2], at: {round: 3}}",
            "{id: classes, scope: class, classes: [0, 1, 2, 3, 4, 5, 6, 7, 8], at: {round: 3}}",
            "{id: rest, scope: class, classes: [9], at: {round: 3}}",
        ]
    )
    folder = run_small("a", requests=requests)
    refused = {event["request"]: event["reason"] for event in events_of(folder, "request_refused")}
    assert refused == {
        "twice": "clients=['3']: have left, and all they held is forgotten",
        "his": "clients=['3']: have left, and all they held is forgotten",
        "last": "clients=['2']: would leave no client",
        "rest": "classes=[9]: would leave no class",
    }
    assert [c["request"]["id"] for c in _certificates(folder)] == ["a", "most", "classes"]
    assert verify(folder)


def test_the_same_request_again_and_another_under_its_name(
    run_small: RunExperiment, monkeypatch: pytest.MonkeyPatch, events_of: Events
) -> None:
    aggregate = Server._aggregate

    def asking(self: Server, server_round: int, arrived: Any) -> None:
        folder = self.record.run_dir  # type: ignore[attr-defined]
        client = {0: "1", 1: "1", 2: "2"}.get(server_round)
        if client is not None:
            submit(folder, ForgetRequest("bob", "client", clients=(client,)))
        if server_round == 0:
            submit(folder, ForgetRequest("nobody", "client", clients=("77",)))
            submit(folder, ForgetRequest("nothing", "class", clients=("1",)))
        aggregate(self, server_round, arrived)

    monkeypatch.setattr(Server, "_aggregate", asking)
    folder = run_small("a")
    refused = {event["request"]: (event["round"], event["reason"]) for event in events_of(folder, "request_refused")}
    assert refused == {
        "nobody": (1, "clients=['77']: must be among the run's clients"),
        "nothing": (1, "classes: names nothing to forget"),
        "bob": (3, "id=bob: another request has it"),
    }
    assert [c["request"]["id"] for c in _certificates(folder)] == ["bob"]


@pytest.mark.parametrize("name", ["../up", "", "a b", ".", "x" * 65])
def test_a_name_that_is_no_file_is_refused(name: str) -> None:
    request = f"{{id: '{name}', scope: client, clients: [3], at: {{round: 1}}}}"
    cfg = compose(["backend=inline", f"unlearning.requests=[{request}]"])
    from fedcl.runs.setup import Setup

    with pytest.raises(ConfigError, match=r"unlearning.requests\[0\].id=.*must be 1 to 64"):
        Setup.of(cfg)


LATE = ["async.buffer=2", "devices=lognormal", "devices.sigma=1.0", "rounds_per_task=4", "async.finished_task=keep"]


@pytest.mark.parametrize("scope", ["client", "class"])
@pytest.mark.parametrize("policy", ["drop", "rebase"])
def test_messages_on_their_way(
    policy: str, scope: str, halves: Path, run_small: RunExperiment, events_of: Events, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who leaves is heard no more; the others' updates of the edited model are refused, or count from the new one."""
    flights: dict[str, dict[str, Any]] = {}
    edit = Server.edit

    def looking(self: Server, models: Any) -> None:
        flights["before"] = {client: flight.model_epoch for client, flight in self.arrivals.flights.items()}
        edit(self, models)
        assert self.exchange.grid.states is not None  # type: ignore[attr-defined]

    monkeypatch.setattr(Server, "edit", looking)
    what = {"client": "clients: [3]", "class": "classes: [0]"}[scope]
    request = f"{{id: a, scope: {scope}, {what}, at: {{round: 3}}}}"
    settings = [*LATE, "learner=er", "unlearner=halves", f"unlearning.in_flight={policy}"]
    folder = run_small("a", *settings, requests=request, config_dirs=[halves])
    assert events_of(folder, "client_failed", "reply_rejected") == []
    dropped = [event["client"] for event in events_of(folder, "update_dropped")]
    if scope == "class":
        assert flights["before"] == {}  # everybody may hold some of it: what they compute is called back
        assert dropped == []
    else:
        assert flights["before"]
        assert "3" not in flights["before"]
        assert set(flights["before"].values()) == ({0} if policy == "drop" else {1})
        assert set(dropped) == (set(flights["before"]) if policy == "drop" else set())
        assert "3" not in _trained(folder, 3)
    assert verify(folder)


@pytest.mark.parametrize("policy", [pytest.param("drop", marks=pytest.mark.slow), "rebase"])
def test_late_runs_with_requests_are_resumed(
    policy: str, halves: Path, run_small: RunExperiment, tmp_path: Path, metrics_hash: Hash
) -> None:
    from fedcl.results.launches import Trust
    from fedcl.runs.experiment import resume

    settings = [*LATE, "learner=er", "unlearner=halves", f"unlearning.in_flight={policy}"]
    request = "{id: a, scope: client, clients: [3], at: {round: 3}}"
    whole = run_small("whole", *settings, requests=request, config_dirs=[halves])
    with pytest.MonkeyPatch.context() as patched:
        finalize = Server._finalize

        def stopping(self: Server, server_round: int, counted: Any) -> None:
            if server_round == 3:  # the request was served, what was rebased has not come yet
                raise KeyboardInterrupt
            finalize(self, server_round, counted)

        patched.setattr(Server, "_finalize", stopping)
        with pytest.raises(KeyboardInterrupt):
            run_small("cut", *settings, requests=request, config_dirs=[halves])
    resume(tmp_path / "cut", force=False, quiet=True, trust=Trust(everything=True))
    assert metrics_hash(tmp_path / "cut") == metrics_hash(whole)


def test_a_client_between_two_tasks_forgets_too(run_small: RunExperiment) -> None:
    """Where clients have tasks in their own time, one that takes no part just now keeps no sample either."""
    settings = ["learner=er", "+scenario/schedule=shuffled", "client.epochs=2"]
    folder = run_small("a", *settings, requests="{id: a, scope: class, classes: [0, 1, 2], at: {round: 3}}")
    _, clients = Checkpoints(folder).load()
    assert clients
    for _, state in clients.values():
        held = state["plugins"]["learner.er"]
        columns = set(held["y"].tolist()) if "y" in held else set()
        assert columns.isdisjoint({0, 1, 2})
