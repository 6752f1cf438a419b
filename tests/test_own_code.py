"""A user's own code that does not fit: one line that names it, with nothing written; faults inside keep theirs."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedcl.cli import main

SMALL = ["backend=inline", "num_clients=3", "rounds_per_task=1", "scenario.num_tasks=2", "compare_with=null",
         "figures=false", "run_dir=run", "strategy/projection=none"]  # fmt: skip
CODE = '''
"""Code of a user's own."""

import random

import numpy as np
import torch
from torch import nn

from fedcl.contracts.learner import Phase, Plugin
from fedcl.data.dataset import Partition
from fedcl.models.networks import Dropout, Network
from fedcl.contracts.strategy import GLOBAL, Collaboration


class OldLoss(Plugin):
    phase = Phase.REGULARISER

    def loss(self, ctx, batch):
        return 0.0


class OldFinish(Collaboration):
    def finish(self, aggregate):
        return {GLOBAL: aggregate.mean()}


class Positional(Plugin):
    def __init__(self, weight, /):
        pass


class Faulty(Plugin):
    def __init__(self, *, weight=1):
        weight()


def old_partition(y_train, y_test, *, num_clients, num_classes, rng):
    return Partition((), ())


def old_source(*, folder):
    return None


def faulty_source(*, root):
    return root + 1


class Net(Network):
    def __init__(self, *, input_shape, heads):
        super().__init__()
        self.body = nn.Linear(64, 8)
        self.extra()
        self.attach_heads(8, heads)

    def extra(self):
        pass

    def between(self, x):
        return x

    def forward(self, x):
        return self.classify(self.between(self.body(x.flatten(1)).relu()))


class TorchDropout(Net):
    def extra(self):
        self.drop = nn.Dropout(0.5)


class Functional(Net):
    def between(self, x):
        return nn.functional.dropout(x, 0.5, self.training)


class Noise(Net):
    def between(self, x):
        return x + torch.randn_like(x)


class NumpyNoise(Net):
    def between(self, x):
        return x * float(np.random.rand())


class PythonNoise(Net):
    def between(self, x):
        return x * random.random()


class Counter(Net):
    def extra(self):
        self.register_buffer("calls", torch.zeros(1, dtype=torch.int64))

    def between(self, x):
        self.calls += 1
        return x


class Double(Net):
    def extra(self):
        self.register_buffer("scale", torch.ones(1, dtype=torch.float64))


class Cumulative(Net):
    def extra(self):
        self.norm = nn.BatchNorm1d(8, momentum=None)

    def between(self, x):
        return self.norm(x)


class Plain(Net):
    def forward(self, x):
        return torch.cat([head(self.body(x.flatten(1))) for head in self.heads], 1)


class Good(Net):
    def extra(self):
        self.drop, self.norm = Dropout(0.5), nn.BatchNorm1d(8)
        self.register_buffer("order", torch.arange(8))

    def between(self, x):
        return self.drop(self.norm(x))[:, self.order]


class NoNetwork:
    def __init__(self, *, input_shape, heads):
        pass
'''


@pytest.fixture
def my(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    name = f"own_{abs(hash(tmp_path))}"
    (tmp_path / f"{name}.py").write_text(CODE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path / name


def run(my: Path, kind: str, text: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    file = my.parent / "my" / kind / "own.yaml"
    file.parent.mkdir(parents=True)
    file.write_text("# Own.\n" + text.replace("M.", f"{my.name}."))
    status = main(["run", "--config-dir", "my", f"{kind}=own", *SMALL, "--quiet"])
    return status, capsys.readouterr().err


@pytest.mark.parametrize(
    ("kind", "text", "said"),
    [
        ("learner", "own: {_target_: M.OldLoss}", ["learner.own", "OldLoss.loss(self, ctx, batch)", "batch, out)"]),
        ("learner", "own: {_target_: M.Positional, weight: 1}", ["learner.own", "Positional", "weight"]),
        ("learner", "own: {_target_: M.OldFinish}", ["learner.own", "finish"]),
        ("strategy/collaboration", "server: {_target_: M.OldFinish}",
         ["strategy.collaboration.server", "OldFinish.finish(self, aggregate)", "view"]),
        ("data/partition", "_target_: M.old_partition", ["data.partition", "old_partition", "y_test"]),
        ("data/partition", "_target_: M.Net", ["data.partition", "Net", "needs this parameter"]),
        ("data", "defaults: [{partition: iid}, _self_]\nsource: {_target_: M.old_source}", ["data.source", "folder"]),
        ("data", "defaults: [{partition: iid}, _self_]\nsource: {_target_: M.old_source, folder: x}",
         ["data.source", "old_source", "Dataset"]),
        ("model", "_target_: M.TorchDropout", ["model: layer drop", "use fedcl.models.networks.Dropout"]),
        *(("model", f"_target_: M.{name}", [name, "global random state", "use fedcl.models.networks.Dropout"])
          for name in ("Functional", "Noise", "NumpyNoise", "PythonNoise")),
        ("model", "_target_: M.Counter", ["Counter changes its buffer calls", "float32 buffer"]),
        ("model", "_target_: M.Cumulative", ["Cumulative changes its buffer norm.num_batches_tracked"]),
        ("model", "_target_: M.Double", ["tensor scale is torch.float64", "float32"]),
        ("model", "_target_: M.Plain", ["Plain.forward returns a Tensor", "self.classify"]),
        ("model", "_target_: M.NoNetwork", ["NoNetwork", "must be a Module"]),
        ("unlearner", "_target_: clients.learners.ewc.EWC", ["unlearner", "EWC", "Unlearner"]),
        ("learner", "own: {_target_: clients.unlearners.retrain.Retrain}", ["learner.own", "Retrain", "Plugin"]),
        ("strategy/optimizer", "server: {_target_: strategies.collaboration.robust.Median}",
         ["strategy.optimizer.server", "Median", "ServerOptimizer"]),
    ],
)  # fmt: skip
def test_code_that_does_not_fit_is_one_line(
    kind: str, text: str, said: list[str], my: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, error = run(my, kind, text, capsys)
    assert status == 2, error
    assert error.count("\n") == 1
    assert [part for part in said if part not in error] == [], error
    assert not (my.parent / "run").exists()


@pytest.mark.parametrize(
    ("kind", "text", "line"),
    [
        ("learner", "own: {_target_: M.Faulty}", "weight()"),
        ("data", "defaults: [{partition: iid}, _self_]\nsource: {_target_: M.faulty_source, root: x}", "root + 1"),
    ],
)  # fmt: skip
def test_a_fault_inside_keeps_its_traceback(
    kind: str, text: str, line: str, my: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, error = run(my, kind, text, capsys)
    assert status == 1
    assert "Traceback" in error
    assert line in error


def test_a_network_that_keeps_the_promises_is_taken_and_left_as_it_was(
    my: Path, capsys: pytest.CaptureFixture[str], one_round: None
) -> None:
    status, error = run(my, "model", "_target_: M.Good", capsys)
    assert status == 0, error
