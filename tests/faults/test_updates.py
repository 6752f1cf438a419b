"""Updates that must not reach the model, or must not be followed: too large, hostile, without weight."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, Message, Metadata, RecordDict

from fedcl.client.runtime import ClientRuntime
from fedcl.client.state import ClientStateStore
from fedcl.config.compose import ConfigError, compose
from fedcl.messages import Reply, Request
from fedcl.results import load
from fedcl.server.validation import change_norm
from fedcl.simulation.compat import message_with
from fedcl.simulation.host import ClientHost, Failure

BAD = "1"  # the client at fault throughout
RunExperiment = Callable[..., Path]


def scaling(factor: float) -> type[ClientRuntime]:
    """Return a runtime whose client BAD multiplies its change."""

    class Scaling(ClientRuntime):
        def train(self, requests: Sequence[Request], store: ClientStateStore) -> Iterator[Reply | Exception]:
            for request, reply in zip(requests, super().train(requests, store), strict=True):
                if request.client != BAD or isinstance(reply, Exception) or reply.model is None:
                    yield reply
                    continue
                assert request.model is not None
                change = factor * (reply.model.double() - request.model.double())
                yield replace(reply, model=(request.model.double() + change).float())

    return Scaling


# -- norms ------------------------------------------------------------------------------------------------------------


def test_the_norm_of_a_change_by_hand() -> None:
    base = torch.tensor([1.0, 2.0, -1.0])
    assert change_norm(base + torch.tensor([3.0, 0.0, 4.0]), base) == 5.0
    # the squares overflow in float32, the norm does not
    assert change_norm(torch.tensor([3e30, 4e30]), torch.zeros(2)) == pytest.approx(5e30, rel=1e-6)


def test_an_update_far_larger_than_the_others_is_logged_and_counts(build: Any) -> None:
    system = build(runtime_class=scaling(100.0)).run()
    outlier = system.events("update_outlier")[0]
    assert (outlier["round"], outlier["client"]) == (0, BAD)
    assert outlier["norm"] > 10 * outlier["median"] > 0
    assert system.events("reply_rejected") == []
    assert system.exchange.committed[BAD] == 3


def test_what_ruins_the_model_is_named_and_the_run_goes_on(build: Any) -> None:
    """The largest change that the bound on numbers lets through: accuracy is gone, and whose fault it is is told."""
    system = build(runtime_class=scaling(1e17)).run()
    outliers = system.events("update_outlier")
    assert (outliers[0]["round"], outliers[0]["client"]) == (0, BAD)
    assert outliers[0]["norm"] > 1e15
    assert bool(torch.isfinite(system.server.global_model).all())
    assert system.server.state.next_round == 4


def test_updates_of_a_size_are_no_outliers(build: Any) -> None:
    assert build().run().events("update_outlier") == []
    assert build(runtime_class=scaling(5.0)).run().events("update_outlier") == []


@pytest.mark.parametrize("cohorts", [True, False])
@pytest.mark.parametrize("factor", [100.0, 1e15, -1e15])
def test_beyond_the_largest_norm_allowed_an_update_is_rejected_by_name(
    build: Any, factor: float, cohorts: bool
) -> None:
    system = build(runtime_class=scaling(factor), cohorts=cohorts)
    system.exchange.max_update_norm = 1.0
    system.run()
    events = system.events("reply_rejected")
    assert [(e["client"], e["round"]) for e in events] == [(BAD, r) for r in range(4)]
    assert all("beyond max_update_norm=1" in e["reason"] for e in events)
    assert len(system.notes.events) == 4  # nothing else happened
    assert BAD not in system.exchange.committed
    assert bool(torch.isfinite(system.server.global_model).all())
    assert change_norm(system.server.global_model, build().server.global_model) < 4 * 1.0


def test_an_ample_norm_changes_no_bit(build: Any) -> None:
    limited = build()
    limited.exchange.max_update_norm = 1e6
    assert torch.equal(limited.run().server.global_model, build().run().server.global_model)


def test_the_largest_norm_is_a_setting(run_experiment: RunExperiment) -> None:
    small = ["num_clients=4", "rounds_per_task=1", "scenario.num_tasks=2", "strategy/projection=none"]
    free = load(run_experiment("free", *small))
    assert free.events["kind"].tolist() == ["partition"]
    tight = run_experiment("tight", *small, "max_update_norm=1e6")
    assert (tight / "metrics.parquet").read_bytes() == (free.path / "metrics.parquet").read_bytes()
    with pytest.raises(RuntimeError, match="0 sound replies"):
        run_experiment("none", *small, "max_update_norm=1e-6")
    reasons = load(tight.parent / "none").events.query("kind == 'reply_rejected'")["reason"]
    assert reasons.str.contains("beyond max_update_norm=1e-06").all()
    for wrong in ("0", "-1", "large"):
        with pytest.raises(ConfigError, match=f"max_update_norm={wrong}: must be number > 0 or null"):
            compose([f"max_update_norm={wrong}"])


# -- weights ----------------------------------------------------------------------------------------------------------


def test_a_round_of_updates_without_weight_changes_nothing(build: Any) -> None:
    class Weightless(ClientRuntime):
        def train(self, requests: Sequence[Request], store: ClientStateStore) -> Iterator[Reply | Exception]:
            for reply in super().train(requests, store):
                assert isinstance(reply, Reply)
                yield replace(reply, num_examples=0)

    system = build(runtime_class=Weightless)
    before = system.server.global_model.clone()
    system.run()
    assert [event["round"] for event in system.events("round_skipped")] == [0, 1, 2, 3]
    assert torch.equal(system.server.global_model, before)
    assert system.server.version == 0


# -- hostile updates --------------------------------------------------------------------------------------------------

HOSTILE = '''
from fedcl.contracts.learner import Context, Phase, Plugin


class SignFlip(Plugin):
    """The named clients send the opposite of what they learned, ``factor`` times."""

    phase = Phase.BOOKKEEPING

    def __init__(self, *, clients: list, factor: float) -> None:
        self.clients, self.factor = {str(client) for client in clients}, factor

    def after_round(self, ctx: Context) -> dict:
        if ctx.client in self.clients:
            ctx.model.flat.copy_(ctx.received - self.factor * (ctx.model.flat - ctx.received))
        return {}
'''


@pytest.fixture
def hostile_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "mine"
    (folder / "learner").mkdir(parents=True)
    (folder / "sign_flip.py").write_text(HOSTILE)
    (folder / "learner" / "sign_flip.yaml").write_text(
        "# Clients that send the opposite.\nsign_flip:\n  _target_: sign_flip.SignFlip\n  clients: []\n  factor: 10.0\n"
    )
    monkeypatch.syspath_prepend(str(folder))
    return folder


def test_krum_survives_a_fifth_of_sign_flippers_where_averaging_does_not(
    run_experiment: RunExperiment, hostile_dir: Path
) -> None:
    # with equal shares of every class: Krum picks one client's model, which on unequal ones is a poor model of all
    common = ["scenario=joint", "data/partition=iid", "num_clients=10", "rounds_per_task=20", "evaluation.every=0"]
    common += ["model.hidden=[64]", "client.optimizer.lr=0.1"]

    def accuracy(name: str, *overrides: str) -> float:
        folder = run_experiment(name, *common, "learner=sign_flip", *overrides, config_dirs=[hostile_dir])
        return float(load(folder).summary["accuracy/average"])  # type: ignore[arg-type]

    flippers = "learner.sign_flip.clients=[3,7]"  # 2 of 10
    averaging = ["strategy/projection=none"]
    honest = accuracy("honest", *averaging)
    assert honest > 0.8
    assert accuracy("averaged", *averaging, flippers) < 0.3
    krum = accuracy("krum", "strategy=flower_krum", "strategy.stock.num_malicious_nodes=2", flippers)
    assert krum > honest - 0.05


# -- replies that come twice, too late, or from nowhere ---------------------------------------------------------------


class Repeating(ClientHost):
    """Answers as ever, and once more what BAD answered the time before."""

    last: RecordDict | None = None

    def run(self, content: RecordDict) -> Iterator[tuple[str, RecordDict | Failure]]:
        for client, reply in super().run(content):
            yield client, reply
            if client == BAD and isinstance(reply, RecordDict):
                if self.last is not None:
                    yield client, self.last
                self.last = reply


def test_an_old_reply_sent_again_with_the_new_one_is_applied_once(build: Any) -> None:
    once, again = build().run(), build(host_class=Repeating).run()
    assert torch.equal(once.server.global_model, again.server.global_model)
    assert [event["client"] for event in again.events("reply_rejected")] == [BAD] * 3
    assert {event["reason"] for event in again.events("reply_rejected")} == {"a second reply to one message"}
    assert again.server.version == 4


class Meddling:
    """A grid between the server and the real one, which may change what is pulled."""

    def __init__(self, grid: Any, change: Callable[[list[Message]], list[Message]]) -> None:
        self._grid, self._change = grid, change

    def __getattr__(self, name: str) -> Any:
        return getattr(self._grid, name)

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        return self._change(list(self._grid.pull_messages(message_ids)))


def _like(message: Message, **changes: Any) -> Message:
    metadata = message.metadata
    fields = {
        name: getattr(metadata, name)
        for name in (
            "run_id", "message_id", "src_node_id", "dst_node_id", "reply_to_message_id", "group_id", "created_at",
            "ttl", "message_type",
        )
    }  # fmt: skip
    copied = message_with(Metadata(**{**fields, **changes}), RecordDict(dict(message.content)))
    copied.content["arrays"] = ArrayRecord({"flat": Array(np.full(31, 1e3, np.float32))})
    return copied


def test_a_reply_kept_back_and_delivered_first_in_a_later_round_is_not_that_rounds_reply(build: Any) -> None:
    kept: list[Message] = []

    def replay(messages: list[Message]) -> list[Message]:
        old = list(kept)
        if not kept:
            kept.extend(_like(m) for m in messages if m.metadata.src_node_id == 101)
        return old + messages

    _assert_forged_replies_change_nothing(build, replay, "replies to another message than", rounds=[1, 2, 3])


def test_a_reply_to_a_message_that_was_never_sent_is_refused(build: Any) -> None:
    def foresee(messages: list[Message]) -> list[Message]:
        return [_like(messages[0], reply_to_message_id="1-999"), *messages]

    _assert_forged_replies_change_nothing(build, foresee, "replies to another message than", rounds=[0, 1, 2, 3])


def test_a_reply_of_a_node_that_nobody_knows_is_refused(build: Any) -> None:
    def intrude(messages: list[Message]) -> list[Message]:
        return [_like(messages[0], src_node_id=666), *messages]

    _assert_forged_replies_change_nothing(build, intrude, "unknown node 666", rounds=[0, 1, 2, 3])


def _assert_forged_replies_change_nothing(build: Any, change: Any, reason: str, *, rounds: list[int]) -> None:
    system, honest = build(), build().run()
    system.exchange.grid = Meddling(system.grid, change)
    system.run()
    assert torch.equal(system.server.global_model, honest.server.global_model)
    assert system.notes.rows == honest.notes.rows
    assert len(system.notes.events) == len(rounds)
    assert all(reason in event["reason"] for event in system.events("reply_rejected"))
