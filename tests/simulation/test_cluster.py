from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from fedcl.results import load

pytestmark = [pytest.mark.ray, pytest.mark.slow]

SCRIPT = Path(__file__).with_name("two_nodes.py")
OVERRIDES = [
    "num_clients=37",
    "scenario.num_tasks=2",
    "learner=faulty",
    "strategy/projection=none",
]


# Ray's own settings notice a dead node after 15 s and more: the longer run is still going on then.
@pytest.mark.parametrize(("health", "rounds"), [("fast", 2), ("default", 10)])
def test_a_node_lost_in_the_middle_of_a_round_changes_no_bit(
    health: str,
    rounds: int,
    tmp_path: Path,
    faulty_dir: Path,
    run_experiment: Callable[..., Path],
    metrics_hash: Callable[[Path], str],
    start_apart: Callable[..., subprocess.Popen[str]],
) -> None:
    overrides = [*OVERRIDES, f"rounds_per_task={rounds}"]
    inline = run_experiment("inline", *overrides, config_dirs=[faulty_dir])
    folder, marks = tmp_path / "cluster", tmp_path / "marks"
    marks.mkdir()
    faults = ["learner.faulty.faults='20:mark'", "learner.faulty.delay=0.03", f"learner.faulty.marks={marks}"]
    settings = [*overrides, *faults, "compare_with=null", "figures=false", f"run_dir={folder}"]
    process = start_apart(str(SCRIPT), health, str(marks), str(faulty_dir), *settings)
    output = process.communicate(timeout=150)[0]
    assert process.returncode == 0, output
    result = json.loads(output.strip().splitlines()[-1])
    assert (marks / "killed").exists()
    assert len(list(marks.glob("node-*"))) == 2
    assert result == {"still_connected": False, "nodes_after": 1}
    assert load(folder).events["kind"].tolist() == ["partition"]
    assert metrics_hash(folder) == metrics_hash(inline)


def test_two_runs_at_once_on_one_machine_do_not_meet(
    tmp_path: Path,
    run_experiment: Callable[..., Path],
    metrics_hash: Callable[[Path], str],
    start_apart: Callable[..., subprocess.Popen[str]],
) -> None:
    small = ["num_clients=7", "rounds_per_task=2", "scenario.num_tasks=2", "compare_with=null", "figures=false"]
    runs = []
    for seed in (0, 1):
        folder = tmp_path / f"ray-{seed}"
        settings = [*small, f"seed={seed}", f"run_dir={folder}", "backend.workers=1"]
        runs.append((seed, folder, start_apart("-m", "fedcl", "run", *settings)))
    for seed, folder, process in runs:
        output = process.communicate(timeout=150)[0]
        assert process.returncode == 0, output
        assert metrics_hash(folder) == metrics_hash(run_experiment(f"inline-{seed}", *small, f"seed={seed}"))
