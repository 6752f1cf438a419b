"""Settings that do not go together: refused or said, by rules that stand in the YAML files."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedcl.cli import main
from fedcl.config.compose import ConfigError, compose, remarks


def test_scaffold_with_momentum_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["run", "strategy/collaboration=scaffold", "client.optimizer.momentum=0.9"]) == 2
    assert "client.optimizer.momentum=0.9 (strategy.collaboration): SCAFFOLD's" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    assert remarks(["strategy/collaboration=scaffold"]) == []


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["strategy/collaboration=scaffold", "rounds_per_task=2"], "rounds_per_task=2 (strategy.collaboration): SCAFF"),
        (["strategy/collaboration=ditto"], "evaluation.personal=false (strategy.collaboration)"),
        (["strategy/collaboration=krum"], "Krum learns little where clients hold different classes"),
        (["strategy=flower_krum", "data/partition=shards"], "Krum learns little"),
        (["strategy/collaboration=fedat"], "no update is late here"),
        (["strategy/staleness=drop"], "no update is ever late"),
        (
            ["strategy/collaboration=pfedme", "evaluation.personal=true", "client.optimizer.momentum=0.9"],
            "pFedMe's steps have no momentum",
        ),
        (["learner=gpm", "client.optimizer.weight_decay=0.1"], "breaks its guarantee"),
        (
            ["unlearner=sifu", "unlearner.epsilon=2"],
            "unlearner.epsilon=2.0 with unlearner.mechanism=classic: the class",
        ),
        (["unlearner=ssd", "unlearner.order=mixed"], "only fisher=official makes batches"),
    ],
)
def test_what_is_better_not_combined_is_said(overrides: list[str], said: str) -> None:
    assert any(said in text for text in remarks(overrides)), remarks(overrides)


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["strategy/collaboration=ditto", "evaluation.personal=true"],
        ["strategy/collaboration=krum", "data/partition=iid"],
        ["strategy/staleness=drop", "devices=lognormal", "async.buffer=4"],
        ["unlearner=sifu", "unlearner.epsilon=2", "unlearner.mechanism=analytic"],
        ["learner=gpm"],
    ],
)
def test_sound_settings_are_not_commented_on(overrides: list[str]) -> None:
    assert remarks(overrides) == []


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ("_refuses_: [{when: {seed: int}, why: 'no'}]", r"^seed=0 \(learner\): no$"),
        ("_refuses_: [{when: {.beta: number > 0, seed: int}, why: 'no'}]", r"^learner\.beta=1\.0 with seed=0: no$"),
        ("_refuses_: {when: {seed: int}, why: 'no'}", r"^learner\._refuses_: must be a list"),
        ("_warns_: [{if: {seed: int}, why: 'no'}]", r"^learner\._warns_\[0\]=.*must have when"),
        ("_warns_: [{when: {seed: itn}, why: 'no'}]", r"^learner\._warns_\[0\]\.seed=itn: not a rule"),
        ("_refuses_: [{when: {no.such.key: any}, why: 'no'}]", None),
        ("_refuses_: [{when: {}, why: 'no'}]", None),
    ],
)
def test_a_file_of_ones_own_may_have_such_rules(rules: str, message: str | None, tmp_path: Path) -> None:
    (tmp_path / "learner").mkdir()
    (tmp_path / "learner" / "mine.yaml").write_text(f"# Mine.\nbeta: 1.0\n{rules}\n")
    if message is None:
        assert compose(["learner=mine"], [tmp_path])["learner"] == {"beta": 1.0}
        return
    with pytest.raises(ConfigError, match=message):
        compose(["learner=mine"], [tmp_path])
