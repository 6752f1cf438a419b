from __future__ import annotations

from pathlib import Path

import pytest

from fedcl.cli import main
from fedcl.config.value_rules import ConfigError
from fedcl.sweep.expansion import Job, expand
from fedcl.sweep.index import Index


def names(*overrides: str) -> list[str]:
    return [job.name for job in expand(overrides)]


def test_every_combination_the_last_varying_fastest() -> None:
    jobs = expand(["seed=0,1", "learner=ewc,er", "num_clients=4"])
    assert jobs[1] == Job("seed-0_learner-er", ("seed=0", "learner=er", "num_clients=4"))
    assert names("seed=0,1", "learner=ewc,er") == [
        "seed-0_learner-ewc", "seed-0_learner-er", "seed-1_learner-ewc", "seed-1_learner-er",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("override", "values"),
    [
        ("learner=[ewc,er]", ["learner=[ewc,er]"]),  # a list is one value
        ("learner=[ewc,er],gpm", ["learner=[ewc,er]", "learner=gpm"]),
        ("seed=choice(3,5)", ["seed=3", "seed=5"]),
        ("seed=range(0,6,2)", ["seed=0", "seed=2", "seed=4"]),
        ("strategy/optimizer=glob(ad*)", ["strategy/optimizer=adagrad", "strategy/optimizer=adam"]),
        ("compare_with=learner=er,seed=3", ["compare_with=learner=er,seed=3"]),
    ],
)
def test_hydras_grammar(override: str, values: list[str]) -> None:
    assert [job.overrides for job in expand([override])] == [(value,) for value in values]


def test_names_are_folders_and_tell_jobs_apart() -> None:
    assert names("learner=[ewc,er],gpm") == ["learner-ewc+er", "learner-gpm"]
    assert names("strategy/projection=none,fot", "client.optimizer.lr=0.1") == ["projection-none", "projection-fot"]
    assert names("data.root='/a b','../c'") == ["root-ab", "root-..-c"]
    clash = names("data.root='a b','a,b','a-b'")
    assert len(set(clash)) == 3
    assert names("seed=4") == ["run"]
    assert all(len(name) < 160 for name in names(*(f"client.a{i}=1,2" for i in range(9))))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["seed=0,0"], "makes the same job twice"),
        (["seed=0,1", "seed=2"], "seed is there twice"),
        (["client.optimizer.lr=interval(0,1)"], "values that can be counted"),
        (["seed"], "not an override"),
        (["learner=glob(nosuch*)"], "has no value"),
    ],
)
def test_what_is_no_sweep(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        expand(overrides)


def test_jobs_join_those_of_the_folder(tmp_path: Path) -> None:
    index = Index.read(tmp_path)
    first = index.add(expand(["seed=0,1", "num_clients=4"]))
    first[0].status = "done"
    index.write()
    again = Index.read(tmp_path)
    joined = again.add(expand(["num_clients=4", "seed=0,1,2"]))  # the order of settings is of no account
    assert [(entry.name, entry.status) for entry in joined] == [
        ("seed-0", "done"), ("seed-1", "waiting"), ("seed-2", "waiting"),
    ]  # fmt: skip
    assert not again.is_done(joined[0])  # its run is gone, and has to be run again
    with pytest.raises(ConfigError, match=r"job seed-0 has other settings \(num_clients=4, num_clients=5\)"):
        again.add(expand(["seed=0,1", "num_clients=5"]))
    (tmp_path / "sweep.json").write_text("[]")
    with pytest.raises(ConfigError, match=r"sweep\.json: must be a mapping"):
        Index.read(tmp_path)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["seed=0,1,oops"], "job seed-oops: seed=oops"),
        (["scenario.num_tasks=2,3"], "job num_tasks-3: "),  # composes, but ten classes do not make three tasks
        (["seed=0,1", "run_dir=x"], "set sweep_dir"),
        (["protocol=two_phase", "seed=0,1"], "no job of a sweep"),
    ],
)
def test_a_mistake_in_the_last_job_leaves_nothing(
    overrides: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["sweep", *overrides, "backend=inline", f"sweep_dir={tmp_path / 'out'}"]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_folder_with_something_else_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "thesis.tex").touch()
    assert main(["sweep", "seed=0,1", "backend=inline", f"sweep_dir={tmp_path}"]) == 2
    assert "must be new, empty, or a sweep's folder with its sweep.json" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
