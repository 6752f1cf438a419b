from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from fedcl.config import compose
from fedcl.experiment import run
from fedcl.results import load

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_session")]

Play = Callable[..., Path]
Hash = Callable[[Path], str]
SMALL = ["num_clients=19", "rounds_per_task=2", "scenario.num_tasks=2"]


def _ray(folder: Path, workers: int, *overrides: str, config_dirs: tuple[Path, ...] = ()) -> Path:
    settings = ["compare_with=null", "figures=false", f"run_dir={folder}", f"backend.workers={workers}", *overrides]
    return run(compose(settings, config_dirs), settings, config_dirs, quiet=True)


def test_any_number_of_workers_gives_the_inline_bits(tmp_path: Path, run_experiment: Play, metrics_hash: Hash) -> None:
    overrides = [*SMALL, "learner=[ewc,er]", "strategy/projection=fot", "evaluation.personal=true"]
    inline = metrics_hash(run_experiment("inline", *overrides))
    assert metrics_hash(_ray(tmp_path / "one", 1, *overrides)) == inline
    assert metrics_hash(_ray(tmp_path / "two", 2, *overrides)) == inline


def test_personal_models_and_payloads_cross_processes(tmp_path: Path, run_experiment: Play, metrics_hash: Hash) -> None:
    for name in ("fedcac", "scaffold"):
        overrides = [*SMALL, f"strategy/collaboration={name}", "strategy/projection=none"]
        inline = metrics_hash(run_experiment(name, *overrides))
        assert metrics_hash(_ray(tmp_path / f"{name}-ray", 2, *overrides)) == inline


def test_a_worker_that_dies_once_changes_no_bit(
    tmp_path: Path, run_experiment: Play, metrics_hash: Hash, faulty_dir: Path
) -> None:
    overrides = [*SMALL, "learner=faulty", "strategy/projection=none"]
    clean = run_experiment("clean", *overrides, config_dirs=[faulty_dir])
    dies = "learner.faulty.fault=exit_once"
    folder = _ray(tmp_path / "dies", 2, *overrides, dies, config_dirs=(faulty_dir,))
    assert (tmp_path / "died").exists()
    assert load(folder).events["kind"].tolist() == ["partition"]
    assert metrics_hash(folder) == metrics_hash(clean)


def test_a_client_that_always_kills_its_worker_costs_its_own_reply(tmp_path: Path, faulty_dir: Path) -> None:
    overrides = [*SMALL, "learner=faulty", "strategy/projection=none", "learner.faulty.fault=exit_always"]
    folder = _ray(tmp_path / "dies", 2, *overrides, config_dirs=(faulty_dir,))
    read = load(folder)
    failed = read.events[read.events["kind"] == "client_failed"]
    assert failed[["round", "client"]].to_numpy().tolist() == [[1, "1"]]
    trained = read.metrics[read.metrics["name"] == "num_examples"].groupby("round")["client"].nunique()
    assert trained.tolist() == [19, 18, 19, 19]


@pytest.mark.parametrize(("fault", "kind"), [("raise", "client_failed"), ("rubbish", "reply_rejected")])
def test_a_failing_client_is_named_and_the_run_goes_on_with_the_same_bits(
    fault: str, kind: str, tmp_path: Path, run_experiment: Play, metrics_hash: Hash, faulty_dir: Path
) -> None:
    overrides = [*SMALL, "learner=faulty", "strategy/projection=none", f"learner.faulty.fault={fault}"]
    inline = run_experiment("inline", *overrides, config_dirs=[faulty_dir])
    folder = _ray(tmp_path / "ray", 2, *overrides, config_dirs=(faulty_dir,))
    events = load(folder).events
    event = events[events["kind"] == kind].iloc[0]
    assert (event["client"], event["round"]) == ("1", 1)
    assert ("client says no" if fault == "raise" else "hidden.0.weight") in event["reason"]
    assert metrics_hash(folder) == metrics_hash(inline)


def test_a_worker_that_cannot_be_built_stops_the_run_with_its_reason(tmp_path: Path, faulty_dir: Path) -> None:
    (faulty_dir / "learner" / "broken.yaml").write_text(
        "# Works in the driver only.\nbroken:\n  _target_: broken.Broken\n"
    )
    (faulty_dir / "broken.py").write_text(
        "import ray\n"
        "from fedcl.client.plugin import Plugin\n"
        "if ray.is_initialized() and ray.get_runtime_context().get_actor_id():\n"
        "    raise RuntimeError('no such device here')\n"
        "class Broken(Plugin):\n    '''Fine.'''\n"
    )
    with pytest.raises(Exception, match="no such device here"):
        _ray(tmp_path / "a", 1, *SMALL, "learner=broken", config_dirs=(faulty_dir,))
    assert load(tmp_path / "a").status == "failed"
