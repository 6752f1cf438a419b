from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fedcl.config.compose import ConfigError, compose
from fedcl.results import load
from fedcl.runs.experiment import run
from fedcl.runs.setup import Setup
from fedcl.simulation.backend import open_backend
from fedcl.simulation.cluster import start_ray

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_session")]

RunExperiment = Callable[..., Path]
Hash = Callable[[Path], str]
SMALL = ["num_clients=19", "rounds_per_task=2", "scenario.num_tasks=2"]
FAULTY = [*SMALL, "learner=faulty", "strategy/projection=none"]


def _ray(folder: Path, workers: int | None, *overrides: str, config_dirs: tuple[Path, ...] = ()) -> Path:
    count = [] if workers is None else [f"backend.workers={workers}"]
    settings = ["compare_with=null", "figures=false", f"run_dir={folder}", *count, *overrides]
    return run(compose(settings, config_dirs), settings, config_dirs, quiet=True)


def _models(run_dir: Path) -> dict[str, str]:
    """Return the SHA-256 of what the server holds after each round."""
    folders = sorted((run_dir / "checkpoints").glob("round_*"))
    return {f.name: hashlib.sha256((f / "tensors.safetensors").read_bytes()).hexdigest() for f in folders}


def _failed(run_dir: Path) -> list[tuple[int, str, str]]:
    events = load(run_dir).events
    failed = events[events["kind"] == "client_failed"]
    return [(int(e["round"]), str(e["client"]), str(e["reason"])) for _, e in failed.iterrows()]


def test_two_workers_give_the_inline_bits(tmp_path: Path, run_experiment: RunExperiment, metrics_hash: Hash) -> None:
    overrides = [*SMALL, "learner=[ewc,er]", "strategy/projection=fot", "evaluation.personal=true"]
    inline = metrics_hash(run_experiment("inline", *overrides))
    assert metrics_hash(_ray(tmp_path / "two", 2, *overrides)) == inline


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fedcac", "scaffold"])
def test_personal_models_and_payloads_cross_processes(
    name: str, tmp_path: Path, run_experiment: RunExperiment, metrics_hash: Hash
) -> None:
    overrides = [*SMALL, f"strategy/collaboration={name}", "strategy/projection=none"]
    inline = metrics_hash(run_experiment(name, *overrides))
    assert metrics_hash(_ray(tmp_path / f"{name}-ray", 2, *overrides)) == inline


@pytest.mark.slow
def test_the_model_after_every_round_depends_on_nothing_but_the_configuration(
    tmp_path: Path, run_experiment: RunExperiment, metrics_hash: Hash, faulty_dir: Path
) -> None:
    # 37 clients make two whole blocks and a piece; one reply is rejected, one worker is killed in the middle
    overrides = [*FAULTY, "num_clients=37", "checkpoint.keep=1000", "checkpoint.min_seconds=0"]
    clean = run_experiment("inline", *overrides, "learner.faulty.faults='5:rubbish'", config_dirs=[faulty_dir])
    expected = _models(clean)
    assert len(expected) == len(set(expected.values())) == 4
    for workers in (1, 2, 3):
        marks = tmp_path / f"marks-{workers}"
        marks.mkdir()
        faults = ["learner.faulty.faults='5:rubbish 21:kill_once'", f"learner.faulty.marks={marks}"]
        folder = _ray(tmp_path / f"ray-{workers}", workers, *overrides, *faults, config_dirs=(faulty_dir,))
        assert (marks / "21-kill_once").exists()
        assert load(folder).events["kind"].tolist() == ["partition", "reply_rejected"]
        assert _models(folder) == expected
        assert metrics_hash(folder) == metrics_hash(clean)


@pytest.mark.slow
def test_only_the_client_that_always_kills_its_worker_is_lost(
    tmp_path: Path, run_experiment: RunExperiment, metrics_hash: Hash, faulty_dir: Path
) -> None:
    raising = run_experiment("inline", *FAULTY, "learner.faulty.faults='1:raise'", config_dirs=[faulty_dir])
    faults = "learner.faulty.faults='1:exit 2:kill_once'"
    folder = _ray(tmp_path / "dies", 2, *FAULTY, faults, config_dirs=(faulty_dir,))
    assert (tmp_path / "2-kill_once").exists()
    [(server_round, client, reason)] = _failed(folder)
    assert (server_round, client) == (1, "1")
    assert "died with this client 2 times" in reason
    read = load(folder)
    trained = read.metrics[read.metrics["name"] == "num_examples"].groupby("round")["client"].nunique()
    assert trained.tolist() == [19, 18, 19, 19]
    assert metrics_hash(folder) == metrics_hash(raising)


def test_failing_clients_are_named_and_the_run_goes_on_with_the_same_bits(
    tmp_path: Path, run_experiment: RunExperiment, metrics_hash: Hash, faulty_dir: Path
) -> None:
    overrides = [*FAULTY, "learner.faulty.faults='1:rubbish 2:raise 3:memory 4:leave 5:interrupt'"]
    inline = run_experiment("inline", *overrides, config_dirs=[faulty_dir])
    folder = _ray(tmp_path / "ray", 2, *overrides, config_dirs=(faulty_dir,))
    reasons = {client: reason for server_round, client, reason in _failed(folder) if server_round == 1}
    assert reasons.keys() == {"2", "3", "4", "5"}
    assert reasons["2"] == "ValueError: client says no"
    assert reasons["3"] == "MemoryError: cannot allocate a tebibyte"
    assert reasons["4"] == "ClientEnded: SystemExit: 3"
    assert reasons["5"].startswith("ClientEnded: KeyboardInterrupt")
    events = load(folder).events
    [(_, rejected)] = events[events["kind"] == "reply_rejected"].iterrows()
    assert (rejected["client"], rejected["round"]) == ("1", 1)
    assert "hidden.0.weight" in rejected["reason"]
    assert metrics_hash(folder) == metrics_hash(inline)


@pytest.mark.slow
def test_a_client_that_hangs_costs_its_own_reply_and_bounded_time(
    tmp_path: Path, run_experiment: RunExperiment, metrics_hash: Hash, faulty_dir: Path
) -> None:
    overrides = [*FAULTY, "num_clients=3", "rounds_per_task=1"]
    raising = run_experiment(
        "inline", *overrides, "learner.faulty.visit=0", "learner.faulty.faults='1:raise'", config_dirs=[faulty_dir]
    )
    # a hundred times what a client takes that does not hang; that one sleeps longer than this test may last
    hang = ["learner.faulty.visit=0", "learner.faulty.faults='1:hang'", "backend.client_timeout=6"]
    folder = _ray(tmp_path / "hangs", 1, *overrides, *hang, config_dirs=(faulty_dir,))
    assert _failed(folder) == [(0, "1", "no answer within backend.client_timeout=6 s")]
    assert metrics_hash(folder) == metrics_hash(raising)


def test_a_worker_that_cannot_be_built_stops_the_run_with_its_reason(tmp_path: Path, faulty_dir: Path) -> None:
    _write_broken(faulty_dir, "raise RuntimeError('no such device here')")
    with pytest.raises(Exception, match="no such device here"):
        _ray(tmp_path / "a", 1, *SMALL, "learner=broken", config_dirs=(faulty_dir,))
    assert load(tmp_path / "a").status == "failed"


@pytest.mark.slow
def test_workers_that_die_while_they_start_stop_the_run(tmp_path: Path, faulty_dir: Path) -> None:
    _write_broken(faulty_dir, "import os; os._exit(3)")
    with pytest.raises(RuntimeError, match="3 workers in a row died while they started"):
        _ray(tmp_path / "a", 1, *SMALL, "learner=broken", config_dirs=(faulty_dir,))


def _write_broken(folder: Path, statement: str) -> None:
    (folder / "learner" / "broken.yaml").write_text("# Works in the driver only.\nbroken:\n  _target_: broken.Broken\n")
    (folder / "broken.py").write_text(
        "import ray\n"
        "from fedcl.contracts.learner import Plugin\n"
        "if ray.is_initialized() and ray.get_runtime_context().get_actor_id():\n"
        f"    {statement}\n"
        "class Broken(Plugin):\n    '''Fine.'''\n"
    )


@pytest.mark.slow
def test_workers_of_several_classes_share_the_work(
    tmp_path: Path, run_experiment: RunExperiment, metrics_hash: Hash
) -> None:
    inline = run_experiment("inline", *SMALL)
    classes = "backend.worker_classes=[{count:1},{count:2,num_cpus:0.5}]"
    assert metrics_hash(_ray(tmp_path / "mixed", None, *SMALL, classes)) == metrics_hash(inline)


def test_workers_that_no_node_can_hold_are_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="ask for 64 CPU together, Ray has 3"):
        _ray(tmp_path / "a", 64, *SMALL)
    with pytest.raises(ConfigError, match="ask for 2 phone together, Ray has 0"):
        _ray(tmp_path / "b", None, *SMALL, "backend.worker_classes=[{count:2,num_cpus:0.5,resources:{phone:1}}]")


@pytest.mark.parametrize("address", ["127.0.0.1:9", "ray://127.0.0.1:9"])
def test_an_address_where_nobody_listens_is_refused_at_once(address: str) -> None:
    with pytest.raises(ConfigError, match=f"backend.address={address}: no Ray cluster answers there"):
        start_ray(address, workers=1)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("backend.client_timeout=0", "backend.client_timeout=0: must be number > 0 or null"),
        ("backend.worker_classes=4", "backend.worker_classes=4: must be list"),
        ("backend.worker_classes=[{num_cpus:1}]", r"backend.worker_classes\[0\]=.*count is missing"),
        ("backend.worker_classes=[{count:1,cores:2}]", r"backend.worker_classes\[0\]=.*cores is not known here"),
        ("backend.worker_classes=[{count:0}]", r"backend.worker_classes\[0\].count=0: must be int >= 1"),
        ("backend.worker_classes=[{count:1,num_gpus:1.5}]", r"\[0\].num_gpus=1.5: must be a whole number above 1"),
        ("backend.worker_classes=[{count:1,resources:{tpu:0}}]", r"\[0\].resources.tpu=0: must be number > 0"),
        ("backend.worker_classes=[{count:1,resources:{GPU:1}}]", r"\[0\].resources.GPU=1: .*not CPU or GPU"),
    ],
)
def test_backend_options_are_checked_when_they_are_read(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        compose([override])


def test_workers_and_worker_classes_exclude_each_other() -> None:
    with pytest.raises(ConfigError, match=r"backend.workers=2: must be left out where backend.worker_classes is given"):
        compose(["backend.workers=2", "backend.worker_classes=[{count:1}]"])


def test_ray_started_here_is_reached_from_nowhere_else() -> None:
    import ray

    assert [node["NodeManagerAddress"] for node in ray.nodes()] == ["127.0.0.1"]


def _pid_and_sum(matrix: torch.Tensor) -> tuple[int, torch.Tensor]:
    if not len(matrix):
        raise ValueError("nothing to add")
    return os.getpid(), (matrix @ matrix.T).sum(0)


def _die_unless_home(home: int) -> int:
    if os.getpid() != home:
        os._exit(3)
    return home


@pytest.mark.slow
def test_the_servers_arithmetic_runs_on_the_workers_with_the_same_bits(tmp_path: Path) -> None:
    cfg = compose([*SMALL, "backend.workers=2", "compare_with=null"])
    setup = Setup.of(cfg)
    matrix = torch.randn(65, 33, generator=torch.Generator().manual_seed(0))
    with open_backend(cfg, setup.dataset, setup.partition) as backend:
        futures = [backend.compute(_pid_and_sum, matrix) for _ in range(4)]
        answers = [future.result() for future in futures]
        assert len({pid for pid, _ in answers} - {os.getpid()}) == 2
        assert all(torch.equal(value, _pid_and_sum(matrix)[1]) for _, value in answers)
        with pytest.raises(ValueError, match="nothing to add"):
            backend.compute(_pid_and_sum, matrix[:0]).result()
        assert backend.compute(_die_unless_home, os.getpid()).result() == os.getpid()
