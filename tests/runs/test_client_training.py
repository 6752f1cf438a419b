"""client/optimizer and client/schedule in whole runs."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest

from fedcl.config.compose import ConfigError, compose, remarks
from fedcl.results import load
from fedcl.runs.setup import Setup
from tests.runs.test_resume import killed_and_resumed

RunExperiment = Callable[..., Path]
Hash = Callable[[Path], str]
SMALL = ("num_clients=2", "model.hidden=[8]", "scenario.num_tasks=2", "rounds_per_task=2", "evaluation.every=0")


PAIRED = {"sgd": "constant", "adam": "cosine", "adamw": "rewarm", "rmsprop": "linear", "torch": "step"}


@pytest.mark.parametrize(
    ("optimizer", "schedule"),
    [
        pytest.param(optimizer, schedule, marks=[] if PAIRED[optimizer] == schedule else pytest.mark.slow)
        for optimizer, schedule in itertools.product(PAIRED, PAIRED.values())
    ],
)
def test_every_choice_trains(optimizer: str, schedule: str, run_experiment: RunExperiment) -> None:
    extra = [] if schedule == "constant" else ["client.schedule.horizon=local"]
    done = run_experiment("run", *SMALL, f"client/optimizer={optimizer}", f"client/schedule={schedule}", *extra)
    assert load(done).summary["accuracy/average"] > 0.2


@pytest.mark.parametrize(("optimizer", "more"), [("adam", []), ("sgd", ["client.optimizer.momentum=0.9"])])
def test_kept_state_is_counted_and_matters(optimizer: str, more: list[str], run_experiment: RunExperiment) -> None:
    lines = [*SMALL, "engine=loop", f"client/optimizer={optimizer}", *more]
    reset, keep = (load(run_experiment(s, *lines, f"client.optimizer.state={s}")).metrics for s in ("reset", "keep"))
    assert "state_bytes" not in set(reset["name"])
    assert (keep[keep["name"] == "state_bytes"]["value"] > 0).all()
    assert "state_bytes" in set(keep["name"])
    loss = [run[run["name"] == "loss"]["value"].tolist() for run in (reset, keep)]
    assert loss[0][:2] == loss[1][:2]
    assert loss[0] != loss[1]


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["strategy/collaboration=scaffold", "client/optimizer=adam"], "SCAFFOLD's control variates suppose plain SGD"),
        (["strategy/staleness=gradient_inversion", "client/optimizer=adamw"], "inversion repeats plain SGD"),
        (["unlearner=sifu", "client.clip_norm=1"], "the proof is for plain SGD"),
        (["client.optimizer.state=kept"], "client.optimizer.state=kept: must be one of reset, keep"),
        (["client.accumulate=0"], "client.accumulate=0: must be int >= 1"),
        (["client/optimizer=torch", "client.optimizer._target_=torch.load"], "package 'torch' is not trusted"),
        (
            ["client/optimizer=torch", "client.optimizer._target_=torch.optim.optimizer.torch.load"],
            "optimizer of torch",
        ),
        (["client/optimizer=torch", "client.optimizer._target_=torch.optim.LBFGS"], "cannot train this model"),
        (["client/optimizer=torch", "client.optimizer.args={decay: 1}"], "client.optimizer.decay: no such parameter"),
        (["strategy/staleness=gradient_inversion", "client/schedule=cosine"], "client/schedule: must be constant"),
    ],
)
def test_what_is_refused(overrides: list[str], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Setup.of(compose(overrides))
    assert said in str(caught.value)


KEPT = (*SMALL, "client/optimizer=adamw", "client.optimizer.state=keep", "client/schedule=rewarm", "learner=er",
        "client.clip_norm=1", "strategy/projection=none")  # fmt: skip


@pytest.mark.slow
@pytest.mark.ray
def test_ray_keeps_an_optimizers_state_as_inline_does(run_experiment: RunExperiment, metrics_hash: Hash) -> None:
    inline = run_experiment("inline", *KEPT)
    assert metrics_hash(run_experiment("ray", *KEPT, "backend=ray", "backend.workers=2")) == metrics_hash(inline)


def test_an_interrupted_run_goes_on_with_the_kept_state(
    tmp_path: Path, run_experiment: RunExperiment, metrics_hash: Hash, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run_experiment("whole", *KEPT)
    killed_and_resumed([*KEPT], tmp_path / "cut", 30, monkeypatch)
    assert metrics_hash(tmp_path / "cut") == metrics_hash(whole)


def test_kept_state_of_forgotten_samples_is_reset(run_experiment: RunExperiment) -> None:
    request = "unlearning.requests=[{id: zero, scope: class, classes: [0], at: {round: 2}}]"
    folder = run_experiment("run", *KEPT, request, "unlearner=continue_without", "unlearning.reference=false")
    (certificate,) = [path.read_text() for path in (folder / "certificates").glob("*.json")]
    assert "client optimizer" in certificate
    assert "its state is a mean over gradients" in certificate


@pytest.mark.parametrize(
    ("choice", "rate"),
    [
        ("strategy/collaboration=ditto", "strategy.collaboration.client.lr"),
        ("strategy/collaboration=fedavg_ft", "strategy.collaboration.client.lr"),
        ("strategy/collaboration=fedrep", ""),
        ("strategy/collaboration=apfl", ""),
        ("strategy/collaboration=pfedme", ""),
        ("learner=fpf", "learner.fpf.lr"),
        ("learner=k_fpf", "learner.k_fpf.lr"),
    ],
)
def test_parts_with_sgd_of_their_own_warn_beside_another_optimizer(choice: str, rate: str) -> None:
    settings = [choice, "strategy/projection=none", "evaluation.personal=true"]
    assert remarks(settings) == []
    (said,) = remarks([*settings, "client/optimizer=adam"])
    assert "SGD" in said
    if rate:
        assert f"set {rate}" in said
        assert remarks([*settings, "client/optimizer=adam", f"{rate}=0.1"]) == []
