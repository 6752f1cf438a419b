from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from fedcl import bench
from fedcl.bench import engine, hetero, pfl
from fedcl.bench.federation import federation
from fedcl.bench.flower import compared
from fedcl.bench.overhead import Loop
from fedcl.bench.processes import descendants, memory_kb, tree_seconds
from fedcl.bench.rival import Orders, Rival
from fedcl.bench.turns import Side, Turn, ratio, take_turns
from fedcl.bench.workload import MODELS, Workload, flat
from fedcl.cli import main
from fedcl.data.dataset import Partition

pytestmark = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="processes are read from /proc")
SMALL = Workload("logistic", (20, 20, 20))
BUSY = "import time\nwhile time.process_time() < 0.3: pass\nprint('done', flush=True)\nimport sys; sys.stdin.read()"


def _busy() -> subprocess.Popen[bytes]:
    """A process that has used 0.3 seconds and waits."""
    process = subprocess.Popen([sys.executable, "-c", BUSY], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    return process


def test_the_time_of_a_tree_is_that_of_all_its_processes() -> None:
    before = tree_seconds(os.getpid())
    with _busy() as process:
        own, without = tree_seconds(os.getpid()) - before, tree_seconds(os.getpid(), without=[process.pid]) - before
        assert tree_seconds(process.pid) >= 0.2
        assert own - without >= 0.2
        assert process.pid in descendants(os.getpid())
        assert memory_kb([process.pid]) > 1000
        assert process.stdin is not None
        process.stdin.close()
    # what it used is counted where it was waited for
    assert tree_seconds(os.getpid()) - before >= 0.2
    assert process.pid not in descendants(os.getpid())


def test_a_ratio_is_the_median_of_the_repetitions_own() -> None:
    slow, fast = Side("slow", int, float), Side("fast", int, float)
    slow.turns = [Turn(2.0, 4.0), Turn(9.0, 9.0), Turn(30.0, 3.0)]
    fast.turns = [Turn(1.0, 1.0), Turn(3.0, 3.0), Turn(3.0, 3.0)]
    assert ratio(slow, fast, "cpu") == 3.0  # of 4, 3 and 1
    assert ratio(slow, fast, "wall") == 3.0  # of 2, 3 and 10
    assert slow.median("wall") == 9.0


def test_sides_take_turns_and_change_the_order() -> None:
    played: list[tuple[str, int]] = []
    sides = [Side(name, lambda n, name=name: played.append((name, n)), time.process_time) for name in "ab"]
    take_turns(sides, 3, 2, warm_up=1)
    assert played == [("a", 1), ("b", 1), ("a", 3), ("b", 3), ("b", 3), ("a", 3)]
    assert [len(side.turns) for side in sides] == [2, 2]


def test_the_table_of_a_rival_says_what_the_marks_are_held_against() -> None:
    rival, own = Side("theirs", int, float), Side("ours", int, float)
    rival.turns, own.turns = [Turn(10.0, 8.0)] * 3, [Turn(2.0, 2.0)] * 3
    result = compared("x", SMALL, [rival, own], 1e-6, 4.0, 5.0)
    assert (result.ratio, result.passed) == (4.0, True)
    assert result.figures == {"cpu": 4.0, "wall": 5.0, "apart": 1e-6}
    assert not compared("x", SMALL, [rival, own], 1e-6, 4.0, 5.1).passed
    assert not compared("x", SMALL, [rival, own], 1e-2, 4.0, 5.0).passed


@pytest.mark.parametrize("model", MODELS)
def test_the_plain_network_is_fedcls(model: str) -> None:
    workload = Workload(model, (4,))
    own = MODELS[model].build(MODELS[model].shape)
    net = workload.network()
    with torch.no_grad():
        for mine, theirs in zip(own.parameters(), net.parameters(), strict=True):
            mine.copy_(theirs)
        x = torch.from_numpy(workload.dataset().train.x)
        assert torch.allclose(own(x).logits, net(x), atol=1e-5)
    sizes = {"logistic": 610, "mlp": 159_010, "lenet": 61_706, "resnet8": 78_042}
    assert flat(net).numel() == sizes[model]


def test_every_client_has_its_samples() -> None:
    parts = Workload("logistic", (3, 5, 2)).partition()
    assert isinstance(parts, Partition)
    assert [part.tolist() for part in parts.train] == [[0, 1, 2], [3, 4, 5, 6, 7], [8, 9]]


def test_the_bare_loop_and_the_engines_train_the_same_model() -> None:
    bare = Loop(SMALL)
    bare.run(2)
    before = flat(SMALL.network())
    with federation(SMALL, "backend=inline") as run:
        run.run(2)
        moved = float((run.weights() - before).norm())
        assert float((run.weights() - bare.flat()).norm()) <= 1e-5 * moved
    copies = engine.Copies(SMALL)
    copies.run(2)
    assert float((copies.flat() - bare.flat()).norm()) <= 1e-5 * moved


def test_a_limit_ends_where_it_began() -> None:
    limit = engine.Limit(SMALL, 20, channels_last=False)
    limit.run(3)
    assert torch.equal(flat(limit.net), flat(SMALL.network()))


ECHO = """
import sys
import numpy as np
from pathlib import Path
from fedcl.bench.rival import Orders
orders, played = Orders(sys.argv[1:]), 0
while rounds := orders.rounds(lambda: np.full(3, played, dtype=np.float32)):
    if rounds == 13:
        raise SystemExit("thirteen is too many")
    played += rounds
"""


@pytest.mark.slow
def test_a_rival_plays_what_it_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "echo_rival.py").write_text(ECHO)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with Rival("echo_rival", SMALL) as rival:
        rival.run(2)
        rival.run(3)
        assert rival.weights().tolist() == [5.0, 5.0, 5.0]
        pid = rival.pid
    assert pid not in descendants(os.getpid())
    with Rival("echo_rival", SMALL) as rival, pytest.raises(RuntimeError, match="thirteen is too many"):
        rival.run(13)


def test_orders_carry_the_workload() -> None:
    (ask, to), (back, response) = os.pipe(), os.pipe()
    os.close(to)
    orders = Orders([str(ask), str(response), json.dumps(vars(SMALL))])
    assert orders.workload == SMALL
    assert orders.rounds(lambda: np.zeros(1, np.float32)) == 0
    assert os.read(back, 100) == b'{"done": true}\n'
    os.close(back)


def test_sizes_are_log_normal_and_the_same_each_time() -> None:
    assert hetero.sizes(0.0, 4) == (hetero.MEDIAN,) * 4
    drawn = hetero.sizes(1.0, 4000)
    assert drawn == hetero.sizes(1.0, 4000)
    assert np.std(np.log(drawn)) == pytest.approx(1.0, abs=0.06)


def test_balance_is_the_mean_over_the_longest_worker() -> None:
    played = hetero.RunSide(1.0, 2, SMALL.steps, lambda rounds: None, ())
    played.busy, played.walls = [(3.0, 1.0), (2.0, 2.0), (4.0, 2.0)], [1.0, 2.0, 4.0]
    assert played.balance == pytest.approx(0.75)
    assert played.rate == SMALL.steps / 2.0


def test_what_cannot_be_measured_here_is_skipped_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["bench", "gpu", "--json", str(tmp_path / "x.json")]) == 0
    assert capsys.readouterr().out == "skipped: no GPU\n"
    assert not (tmp_path / "x.json").exists()
    monkeypatch.setattr(pfl, "version", lambda python: None)
    assert main(["bench", "pfl"]) == 0
    assert "skipped: needs pfl==0.6.0" in capsys.readouterr().out


def test_options_that_a_measurement_lacks_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "repro", "--model", "mlp"]) == 2
    assert "bench repro: has no option --model" in capsys.readouterr().err
    assert main(["bench", "engine", "--model", "gpt"]) == 2
    assert "--model gpt: must be one of logistic, mlp, lenet, resnet8" in capsys.readouterr().err


def test_every_measurement_can_be_found() -> None:
    assert all(callable(bench.measurement(name)) for name in bench.BENCHES)
