"""A device whose program answers with anything, over a real SuperLink and real SuperNodes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest

from fedcl.deploy.layout import Fleet
from fedcl.deploy.processes import Processes
from fedcl.deploy.submit import submit
from fedcl.results import Run, load

pytestmark = [pytest.mark.deployment, pytest.mark.timeout(900)]

YAML = "# For this test.\nodd:\n  _target_: odd_of_tests.Odd\n"
PLAIN = '''
from fedcl.contracts.learner import Plugin


class Odd(Plugin):
    """Nothing odd about it."""

    def after_task(self, ctx):
        pass
'''
# what the device's own program makes of its answers: another malformed one each time, and every fourth time none
HOSTILE = """
import random
from pathlib import Path

import fedcl.client_app as app
import spoiling

real, counter = app.reply_content, Path(__file__).with_name("answers")


def anything(reply, *, live):
    content, count = real(reply, live=live), len(counter.read_bytes()) if counter.exists() else 0
    counter.write_bytes(b"x" * (count + 1))
    if count % 4 == 3:
        raise SystemExit(3)
    kind = "train" if reply.model is not None else "evaluate" if reply.metrics else "task_end"
    return random.Random(count).choice(list(spoiling.spoiled_contents(content, kind)))[1]


app.reply_content = anything
"""
# the same client in a simulation, whose replies are lost instead
SILENT = """
    def setup(self, ctx):
        if ctx.client == "1":
            raise RuntimeError("lost")
"""
SMALL = ["scenario.num_tasks=2", "rounds_per_task=2", "strategy/projection=none", "learner=odd", "figures=false"]


def choice(folder: Path, code: str) -> Path:
    (folder / "learner").mkdir(parents=True)
    (folder / "learner" / "odd.yaml").write_text(YAML)
    (folder / "odd_of_tests.py").write_text(code)
    return folder


def rows(run: Run) -> pd.DataFrame:
    """Return the metrics but for the bytes sent, of which a rejected reply has some too."""
    return run.metrics[~run.metrics["name"].str.startswith("bytes")].reset_index(drop=True)


def test_a_device_that_sends_anything_costs_its_own_replies(
    tmp_path: Path,
    make_fleet: Callable[..., Fleet],
    up: Callable[[Fleet], Processes],
    split: Callable[[Fleet], None],
    samples: Path,
    run_experiment: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fleet = make_fleet()
    split(fleet)
    honest, hostile = choice(tmp_path / "honest", PLAIN), choice(tmp_path / "hostile", HOSTILE + PLAIN)
    (hostile / "spoiling.py").write_text((Path(__file__).parents[1] / "faults" / "spoiling.py").read_text())
    for name in fleet.devices:
        spec = fleet.device(name) / "client.yaml"
        spec.write_text(spec.read_text() + f'config_dirs: ["{hostile if name == "1" else honest}"]\n')
    processes = up(fleet)
    processes.start_server()
    for name in fleet.devices:
        processes.start_device(name)
    own = ["data=npz", f"data.root={samples}", "evaluation.personal=true"]
    folder = submit(fleet, [*own, *SMALL, "data/partition=local"], quiet=True, config_dirs=[honest])
    run = load(folder)
    assert run.status == "done"
    faults = run.events[run.events["kind"].isin(("reply_rejected", "client_failed"))]
    assert set(faults["client"]) == {"1"}
    assert (faults["message"] == "train").sum() == 4
    assert {"reply_rejected", "client_failed"} == set(faults["kind"])
    assert faults["reason"].str.len().between(1, 500).all()
    silent = choice(tmp_path / "silent", PLAIN + SILENT)
    monkeypatch.syspath_prepend(str(silent))
    more = ["num_clients=3", "data.partition.alpha=0.3"]
    lost = load(run_experiment("lost", *own, *SMALL, *more, config_dirs=[silent]))
    pd.testing.assert_frame_equal(rows(run), rows(lost))
