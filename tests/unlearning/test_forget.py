"""``fedcl forget``: what is asked, when it is served, and everything that is refused before a byte is written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedcl.cli import main
from fedcl.results import load
from fedcl.results.checkpoint import Checkpoints
from fedcl.runs.experiment import resume
from fedcl.runs.verify import verify
from fedcl.server.loop import Server

RunExperiment = Callable[..., Path]
Events = Callable[..., list[dict[str, Any]]]
Hash = Callable[[Path], str]


def _files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_finished_run_serves_at_once(finished: Path, capsys: pytest.CaptureFixture[str], events_of: Events) -> None:
    before = load(finished)
    assert main(["forget", str(finished), "--client", "1", "--id", "bob"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0] == "bob: processed before round 4 by clients.unlearners.retrain.Retrain"
    assert out[1].startswith("guarantee: exact:")
    assert Path(out[-1]) == finished / "certificates" / "0002-bob.json"
    assert Path(out[-1]).is_file()
    after = load(finished)
    assert after.status == "done"
    assert len(after.metrics) > len(before.metrics)
    grown = after.metrics.iloc[len(before.metrics) :]
    assert set(grown["phase"]) == {"unlearning"}
    assert after.metrics.iloc[: len(before.metrics)].equals(before.metrics)
    assert [one["requests"] for one in events_of(finished, "request_served")] == [["first"], ["bob"]]
    state = Checkpoints(finished).load()[0]["server"]
    assert {"1", "3"}.isdisjoint(state["committed"])
    assert verify(finished)


@pytest.mark.parametrize(
    ("arguments", "request_"),
    [
        (["--client", "0", "--client", "2"], {"scope": "client", "clients": ["0", "2"]}),
        (["--class", "2"], {"scope": "class", "classes": [2]}),
        (["--samples", "1,5,9", "--client", "0"], {"scope": "sample", "clients": ["0"]}),
        (["--task", "1"], {"scope": "task", "tasks": [1]}),
    ],
)
def test_each_scope(arguments: list[str], request_: dict[str, Any], finished: Path) -> None:
    assert main(["forget", str(finished), "--quiet", "--unlearner", "continue_without", *arguments]) == 0
    content = json.loads(next((finished / "certificates").glob("0002-*.json")).read_text())
    assert {name: content["request"][name] for name in request_} == request_
    assert content["request"]["id"].startswith(request_["scope"])
    assert content["unlearner"]["name"] == "clients.unlearners.continue_without.ContinueWithout"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "name what to forget"),
        (["--class", "1", "--task", "0"], "name what to forget"),
        (["--client", "77"], "clients=['77']: must be among the run's clients"),
        (["--client", "3"], "clients=['3']: have left"),
        (["--samples", "5", "--client", "3"], "clients=['3']: have left"),
        (["--client", "0", "--client", "1", "--client", "2"], "would leave no client"),
        (["--class", "10"], "classes=[10]: must be in 0..9"),
        (["--class", "-1"], "classes=[-1]: must be in 0..9"),
        (["--task", "2"], "tasks=[2]: must be in 0..1"),
        (["--samples", "1,99999"], "samples=[99999]: must be in 0.."),
        (["--client", "1", "--id", "../up"], "id=../up: must be"),
        (["--client", "1", "--id", "first"], "id=first: another request has it"),
        (["--client", "1", "client.epochs=3"], "client.epochs=3: here only unlearner"),
        (["--client", "1", "unlearning.window=3"], "unlearning.window=3: here only unlearner"),
        (["--client", "1", "--unlearner", "nothing"], "unlearner=nothing: no such choice"),
        (["--client", "1", "--unlearner", "federaser"], "must see every round from the first"),
        (["--class", "1", "--unlearner", "federaser"], "must see every round from the first"),
        (["--class", "1", "--unlearner", "pgd"], "scope=class: this unlearner supports client"),
    ],
)
def test_what_cannot_be_served_is_refused_before_anything_is_written(
    arguments: list[str], words: str, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = _files(finished)
    assert main(["forget", str(finished), *arguments]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert len(error.strip().splitlines()) == 1
    assert _files(finished) == before


def test_the_same_again_changes_nothing(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["forget", str(finished), "--client", "1", "--id", "bob"]) == 0
    before = _files(finished)
    assert main(["forget", str(finished), "--client", "1", "--id", "bob"]) == 0
    assert "was submitted before" in capsys.readouterr().out
    assert _files(finished) == before
    assert main(["forget", str(finished), "--client", "2", "--id", "bob"]) == 2
    assert _files(finished) == before


def test_a_run_without_checkpoints_has_nothing_to_change(
    run_small: RunExperiment, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = run_small("a", "checkpoint.every=0")
    assert main(["forget", str(folder), "--client", "1"]) == 2
    assert "keeps no checkpoint" in capsys.readouterr().err


@pytest.mark.slow
def test_an_interrupted_run_serves_when_it_goes_on(
    run_small: RunExperiment, tmp_path: Path, capsys: pytest.CaptureFixture[str], events_of: Events
) -> None:
    with pytest.MonkeyPatch.context() as patched:

        def stop(self: Server, server_round: int, arrived: object) -> None:
            raise KeyboardInterrupt

        patched.setattr(Checkpoints, "prune", stop)
        finalize = Server._finalize

        def stopping(self: Server, server_round: int, counted: Any) -> None:
            if server_round == 2:
                raise KeyboardInterrupt
            finalize(self, server_round, counted)

        patched.setattr(Server, "_finalize", stopping)
        with pytest.raises(KeyboardInterrupt):
            run_small("a")
    folder = tmp_path / "a"
    assert load(folder).status == "interrupted"
    assert main(["forget", str(folder), "--client", "1", "--id", "bob"]) == 0
    assert "when the run goes on" in capsys.readouterr().out
    assert main(["forget", str(folder), "--class", "1", "--unlearner", "ssd"]) == 2
    assert main(["forget", str(folder), "--samples", "5", "--client", "1"]) == 2  # who is about to leave
    assert not (folder / "certificates").exists()
    resume(folder, force=False, quiet=True)
    [event] = events_of(folder, "request_served")
    assert event["round"] == 2  # the round that was not finished is played without the client
    trained = load(folder).metrics
    late = trained[(trained["phase"] == "train") & (trained["round"] >= 2)]
    assert "1" not in set(late["client"])
    assert verify(folder)


def test_a_running_run_serves_before_its_next_round(
    run_small: RunExperiment, monkeypatch: pytest.MonkeyPatch, events_of: Events
) -> None:
    """Handed in by the command while a round runs; a line of rubbish beside it costs an event."""
    responses = []
    aggregate = Server._aggregate

    def asking(self: Server, server_round: int, arrived: Any) -> None:
        folder = self.record.run_dir  # type: ignore[attr-defined]
        if server_round == 1:
            with (folder / "requests.jsonl").open("a") as file:
                file.write("please forget me\n")
            responses.append(main(["forget", str(folder), "--client", "2", "--id", "bob"]))
            responses.append(main(["forget", str(folder), "--client", "2", "--id", "again"]))
            responses.append(main(["forget", str(folder), "--client", "9"]))
        aggregate(self, server_round, arrived)

    monkeypatch.setattr(Server, "_aggregate", asking)
    folder = run_small("a")
    assert responses == [0, 2, 2]
    [served] = events_of(folder, "request_served")
    assert (served["round"], served["requests"]) == (2, ["bob"])
    [refused] = events_of(folder, "request_refused")
    assert refused["reason"].startswith("requests.jsonl line 1: is not valid JSON")
    assert [path.name for path in (folder / "certificates").glob("*.json")] == ["0001-bob.json"]
    assert verify(folder)


def test_a_request_at_the_very_end_is_served(
    run_small: RunExperiment, monkeypatch: pytest.MonkeyPatch, events_of: Events
) -> None:
    """It comes while the last planned one is being served: no round follows, and yet it is not left lying."""
    from fedcl.unlearning.certificate import Certification

    served = Certification.__call__

    def asking(self: Certification, receipt: Any, server: Any) -> None:
        folder = self.run_dir
        if not (folder / "requests.jsonl").exists():
            assert main(["forget", str(folder), "--client", "2", "--id", "late"]) == 0
        served(self, receipt, server)

    monkeypatch.setattr(Certification, "__call__", asking)
    folder = run_small("a", requests="{id: planned, scope: client, clients: [1], at: end}")
    assert [event["requests"] for event in events_of(folder, "request_served")] == [["planned"], ["late"]]
    assert verify(folder)


@pytest.mark.slow
def test_the_run_to_compare_with_keeps_nothing_either(tmp_path: Path) -> None:
    from fedcl.config.compose import compose
    from fedcl.runs.experiment import run
    from tests.unlearning.conftest import SMALL

    settings = [*SMALL, "learner=er", "compare_with='client.epochs=2'", f"run_dir={tmp_path / 'a'}"]
    folder = run(compose(settings), settings, [], quiet=True)
    assert (folder / "reference" / "checkpoints").exists()
    accuracy = load(folder).summary["reference/accuracy/average"]
    assert main(["forget", str(folder), "--client", "1", "--quiet"]) == 0
    assert not (folder / "reference" / "checkpoints").exists()
    assert load(folder).summary["reference/accuracy/average"] == accuracy


@pytest.mark.slow
def test_a_copied_folder_is_a_run_of_its_own(finished: Path, tmp_path: Path, metrics_hash: Hash) -> None:
    other = Path(shutil.copytree(finished, tmp_path / "other"))
    for folder in (finished, other):
        assert main(["forget", str(folder), "--client", "1", "--id", "bob", "--quiet"]) == 0
    assert metrics_hash(finished) == metrics_hash(other)
