from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fedcl.base.tree import equal
from fedcl.client.state import NEVER
from fedcl.contracts.learner import Context, Plugin, State
from fedcl.contracts.strategy import GLOBAL
from fedcl.results.checkpoint import Checkpoints
from fedcl.server.rounds import RoundFailed
from tests.toy import configure, run_toy, write_files


class Failing(Plugin):
    """Fails in round 1 at three of the four clients; remembers how often it succeeded."""

    def __init__(self) -> None:
        self.count = 0

    def load(self, state: State) -> None:
        self.count = state.get("count", 0)

    def state(self) -> State:
        return {"count": self.count}

    def before_round(self, ctx: Context) -> None:
        if ctx.local_round == 1 and ctx.client != "0":
            raise RuntimeError("no power")
        self.count += 1


def test_a_round_with_too_few_replies_is_played_again(build: Any) -> None:
    system = build(plugins={"failing": Failing}, min_replies=2)
    after: list[torch.Tensor] = []
    system.server.run(lambda server_round: after.append(system.server.global_model.clone()))
    (retried,) = system.events("round_retried")
    assert {k: retried[k] for k in ("round", "replies", "attempt")} == {"round": 1, "replies": 1, "attempt": 0}
    assert not torch.equal(after[0], after[1])  # the second attempt counted
    assert system.server.version == 4
    # client 0 trained in the first attempt too, for nothing: that visit is no part of its state
    assert system.exchange.committed["0"] == 4
    assert system.store.load("0", 4)["plugins"]["failing"] == {"count": 4}


def test_without_retries_too_few_replies_stop_the_run(build: Any) -> None:
    system = build(plugins={"failing": Failing}, min_replies=2, retries=0)
    with pytest.raises(RoundFailed, match="round 1: 1 sound replies"):
        system.run()
    assert system.server.state.next_round == 1
    assert system.exchange.committed["0"] == 0


def test_one_reply_is_enough_by_default(build: Any) -> None:
    system = build(plugins={"failing": Failing}).run()
    assert system.events("round_skipped") == []
    assert system.server.version == 4
    assert system.store.load("0", 3)["plugins"]["failing"] == {"count": 4}


class AlwaysFailing(Plugin):
    def before_round(self, ctx: Context) -> None:
        raise RuntimeError("never")


def test_a_run_whose_clients_all_fail_stops(build: Any) -> None:
    system = build(plugins={"failing": AlwaysFailing})
    before = system.server.global_model.clone()
    with pytest.raises(RoundFailed, match="in each of 3 attempts"):
        system.run()
    assert torch.equal(system.server.global_model, before)
    assert len(system.events("client_failed")) == 3 * 4


def test_edit_replaces_models_past_the_strategy(build: Any) -> None:
    system = build().run()
    server = system.server
    assert (server.version, server.state.model_epoch) == (4, 0)
    given = torch.full((31,), 2.0)
    server.edit({GLOBAL: given, "2": given + 1})
    assert (server.version, server.state.model_epoch) == (5, 1)
    assert server.global_model.tolist() == [2.0] * 31
    assert server.state.models["2"].tolist() == [3.0] * 31
    given.zero_()
    assert server.global_model.tolist() == [2.0] * 31
    server.edit({"2": given})
    assert (server.version, server.state.model_epoch) == (5, 2)


@pytest.mark.parametrize("model", [torch.zeros(30), torch.zeros(1, 31), torch.full((31,), float("nan"))])
def test_edit_refuses_what_is_no_model(build: Any, model: torch.Tensor) -> None:
    server = build().server
    before = server.global_model.clone()
    with pytest.raises(ValueError, match=r"edit of '\*'"):
        server.edit({"1": torch.zeros(31), GLOBAL: model})
    assert torch.equal(server.global_model, before)
    assert "1" not in server.state.models
    assert server.state.model_epoch == 0


def test_resume_in_the_middle_gives_the_same_bits(build: Any, tmp_path: Any) -> None:
    plugins = {"failing": Failing}
    whole = build(plugins=plugins).run()
    cut = build(plugins=plugins)
    checkpoints = Checkpoints(tmp_path)

    class Killed(Exception):
        pass

    def after_round(server_round: int) -> None:
        kept = {c: v for c, v in cut.exchange.committed.items() if v != NEVER}
        checkpoints.save(server_round, cut.server.state_dict(), kept, cut.store.load)
        if server_round == 1:
            raise Killed

    with pytest.raises(Killed):
        cut.server.run(after_round)
    state, clients = Checkpoints(tmp_path).load()
    resumed = build(plugins=plugins)
    resumed.server.load_state_dict(state)
    for client, (visit, client_state) in clients.items():
        resumed.store.stage(client, visit, client_state)
    resumed.run()
    assert equal(resumed.server.state_dict(), whole.server.state_dict())
    assert [r for r in whole.notes.rows if r["round"] >= 2] == resumed.notes.rows


def test_selected_clients_only(build: Any) -> None:
    system = build(clients_per_round=2).run()
    by_round = [
        {r["client"] for r in system.notes.rows if r["round"] == k and r["name"] == "num_examples"} for k in range(4)
    ]
    assert all(1 <= len(clients) <= 2 for clients in by_round)
    assert sum(system.exchange.visits.values()) == 8


def test_being_told_of_a_tasks_end_changes_no_draw(tmp_path: Path, device: torch.device) -> None:
    """A learner that is turned off is fine-tuning, bit for bit, though its clients get messages that others do not."""
    files = write_files(tmp_path)
    naive, off = (
        run_toy(configure({"learner": learner, "model": "fot_mlp"}, files, device, "engine=loop", *extra))
        for learner, extra in (("finetune", []), ("ewc", ["learner.ewc.weight=0"]))
    )
    assert naive.hashes == off.hashes
    assert naive.saved[-1]["server"]["visits"] != off.saved[-1]["server"]["visits"]
