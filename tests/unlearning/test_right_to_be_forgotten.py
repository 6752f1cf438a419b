"""The experiment that shows the whole: an asynchronous run of five tasks under FOT, and requests of all four scopes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedcl.cli import main
from fedcl.results import load
from fedcl.results.checkpoint import Checkpoints

Events = Callable[..., list[dict[str, Any]]]
pytestmark = pytest.mark.slow
ASKED = {"leaver": "client", "photos": "sample", "fives": "class", "first": "task"}


@pytest.fixture(scope="module")
def forgotten(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("forgotten") / "run"
    arguments = ["experiment=right_to_be_forgotten", "figures=false", f"run_dir={folder}", "--quiet"]
    assert main(["run", *arguments]) == 0
    return folder


def test_each_request_has_its_certificate(forgotten: Path) -> None:
    contents = [json.loads(path.read_text()) for path in sorted((forgotten / "certificates").glob("*.json"))]
    assert {one["request"]["id"]: one["request"]["scope"] for one in contents} == ASKED
    assert [one["index"] for one in contents] == [1, 2, 3, 4]
    for one in contents:
        assert one["model"]["before"] != one["model"]["after"]
        assert one["guarantee"].startswith("approximate")
        bases = [row for row in one["erasure"] if row["part"] == "FOT"]
        assert [row["outcome"] for row in bases] == ["recomputed"], one["erasure"]
        # next to the reference: a run of its own without the forget set
        assert {"gap/average", "reference/test_accuracy"} <= one["measurements"].keys()
    rounds = [one["server_round"] for one in contents]
    assert rounds == sorted(set(rounds))  # each at its own boundary, in the order of the plan


def test_the_chain_is_valid_and_a_changed_word_is_seen(forgotten: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(forgotten), "--no-replay"]) == 0
    assert capsys.readouterr().out.count(": valid (chain, checkpoint)") == len(ASKED)
    path = sorted((forgotten / "certificates").glob("*.json"))[1]
    text = path.read_text()
    try:
        path.write_text(text.replace("approximate", "exact", 1))
        assert main(["verify", str(forgotten), "--no-replay"]) == 1
    finally:
        path.write_text(text)


def test_late_updates_did_come_and_who_left_took_no_part(forgotten: Path, events_of: Events) -> None:
    """It is an asynchronous run indeed, some updates are several versions old, and the leaver is gone."""
    result = load(forgotten)
    assert result.status == "done"
    assert result.summary["staleness/max"] >= 1
    served = {event["requests"][0]: event["round"] for event in events_of(forgotten, "request_served")}
    assert served.keys() == ASKED.keys()
    table = result.metrics
    late = table[(table["phase"] == "train") & (table["round"] >= served["leaver"])]
    assert len(late)
    assert "3" not in set(late["client"])
    state = Checkpoints(forgotten).load()[0]["server"]
    assert "3" not in state["committed"]
    # what a forgotten thing comes back to is followed to the end
    followed = {name for name in table["name"] if name.startswith("revival/")}
    assert followed == {f"revival/{name}" for name in ASKED}
