from __future__ import annotations

import shutil
import sys
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import fedcl.config.compose
from fedcl.config.compose import ConfigError, build, compose, config_hash, diff, kinds, list_choices, to_yaml
from fedcl.config.conform import conform
from fedcl.config.instantiate import locate
from fedcl.config.own_code import plugin_packages
from fedcl.config.value_rules import parse_rule

REAL = Path(fedcl.config.compose.__file__).resolve().parents[2] / "configs"


def write(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        file = folder / f"{name}.yaml"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(dedent(text))
    return folder


@pytest.fixture
def configs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The real root, backends and pipeline with small choices around them: these tests are of the reader alone."""
    folder = write(
        tmp_path / "configs",
        {
            "data/digits": "# Handwritten digits.\nalpha: 0.5\n_allowed_: {alpha: number > 0}",
            "scenario/task_incremental": "# Tasks.\nnum_tasks: 5\n_allowed_:\n  num_tasks: int >= 1",
            "scenario/free": "# No tasks.\nsteps: 3",
            "model/mlp": "# Small.\n_target_: fedcl.models.MLP\nhidden: [64]\nscale: 1.0",
            "client/optimizer/sgd": "# SGD.\nlr: 0.3\nmomentum: 0.0\n_allowed_: {lr: number > 0, momentum: 'number in [0, 1)'}",  # noqa: E501
            "data/augment/none": "# As they are.\n{}",
            "client/schedule/constant": "# Constant.\n{}",
            "learner/finetune": "# Nothing.\n{}",
            "learner/ewc": "# EWC.\newc:\n  _target_: clients.l.EWC\n  weight: 1.0\n  _allowed_: {weight: number > 0}",
            "learner/er": "# Replay.\ner:\n  _target_: clients.learners.ER\n  size: 200",
            "strategy/stock": "# One of Flower's.\nstock: {}",
            "strategy/staleness/none": "# None.\n{}",
            "strategy/collaboration/fedavg": "# Mean.\nserver: {_target_: strategies.collaboration.FedAvg}",
            "strategy/optimizer/none": "# None.\n{}",
            "strategy/projection/none": "# None.\n{}",
            "strategy/projection/fot": "# FOT.\nserver: {_target_: strategies.projection.FOT, eps: 0.9}",
            "experiment/bench": (
                "# @package _global_\n# A benchmark.\ndefaults:\n  - override /learner: [ewc, er]\n"
                "  - override /scenario: free\nseed: 5\nscenario:\n  steps: 7\n"
            ),
            "experiment/typo": "# @package _global_\n# Wrong.\nclient:\n  epoch: 3\n",
            "experiment/unruly": "# @package _global_\n# Wrong.\nclient:\n  epochs: 0\n",
        },
    )
    shutil.copy(REAL / "config.yaml", folder)
    shutil.copytree(REAL / "backend", folder / "backend")
    shutil.copytree(REAL / "devices", folder / "devices")
    for group in ("protocol", "trackers", "unlearner"):
        shutil.copytree(REAL / group, folder / group)
    shutil.copy(REAL / "strategy/pipeline.yaml", folder / "strategy")
    monkeypatch.setattr("fedcl.config.compose.CONFIG_DIR", folder)
    return folder


def everything(node: Any) -> list[str]:
    if isinstance(node, dict):
        return [*node, *(key for value in node.values() for key in everything(value))]
    return []


@pytest.mark.usefixtures("configs")
class TestCompose:
    def test_defaults_are_plain_and_without_rules(self) -> None:
        cfg = compose([])
        assert (cfg["seed"], cfg["num_clients"], cfg["client"]["optimizer"]["lr"]) == (0, 10, 0.3)
        assert cfg["compare_with"].split()[-1] == "strategy/projection=none"
        assert cfg["strategy"]["projection"]["server"]["eps"] == 0.9
        assert type(cfg["client"]) is dict
        assert "_allowed_" not in everything(cfg)

    def test_each_call_returns_its_own_copy(self) -> None:
        compose([])["client"]["epochs"] = 99
        assert compose([])["client"]["epochs"] == 1

    def test_choices_lists_and_values(self) -> None:
        cfg = compose(["learner=[ewc,er]", "learner.ewc.weight=3", "strategy/projection=none", "backend=inline"])
        assert cfg["learner"]["ewc"]["weight"] == 3.0
        assert type(cfg["learner"]["ewc"]["weight"]) is float
        assert cfg["learner"]["er"]["size"] == 200
        assert cfg["strategy"]["projection"] == {}
        assert cfg["backend"]["name"] == "inline"

    def test_experiment_chooses_and_sets(self) -> None:
        cfg = compose(["experiment=bench", "learner=er"])
        assert (cfg["seed"], cfg["scenario"]["steps"], list(cfg["learner"])) == (5, 7, ["er"])
        assert list(compose(["experiment=bench"])["learner"]) == ["ewc", "er"]
        assert compose(["experiment=bench", "scenario.steps=2"])["scenario"] == {"steps": 2}

    @pytest.mark.parametrize(
        ("overrides", "message"),
        [
            (["lrr=2"], "lrr=2: no such key; did you mean client.optimizer.lr?"),
            (["client.epoch=2"], "client.epoch=2: no such key; did you mean client.epochs?"),
            (["+client.epoch=2"], "+client.epoch=2: keys cannot be added"),
            (["~client"], "~client: keys cannot be removed"),
            (["_allowed_.seed=any"], "_allowed_.seed=any: no such key"),
            (["learner=ewcc"], "learner=ewcc: no such choice; available: er, ewc, finetune"),
            (["learner=[ewc,x]"], "learner=x: no such choice"),
            (["learner=null"], "learner=null: no such choice"),
            (["experiment=none"], "experiment=none: no such choice; available: bench, typo, unruly"),
            (
                ["strategy.projection=none"],
                "strategy.projection=none: to choose another one write strategy/projection=none",
            ),
            (["strategy=stock", "strategy/projection=none"], "Could not override 'strategy/projection'"),
            (["scenario.num_tasks=0"], "scenario.num_tasks=0: must be int >= 1"),
            (["scenario.num_tasks=true"], "scenario.num_tasks=true: must be int >= 1"),
            (["client.epochs=abc"], "client.epochs=abc: must be int >= 1"),
            (["client.epochs=1.5"], "client.epochs=1.5: must be int >= 1"),
            (["client.optimizer.lr=nan"], "client.optimizer.lr=nan: must be number > 0"),
            (["client.optimizer.momentum=1"], "client.optimizer.momentum=1: must be number in [0, 1)"),
            (["model.scale=big"], "model.scale=big: must be a finite number"),
            (["model.scale=true"], "model.scale=true: must be a finite number"),
            (["model.scale=inf"], "model.scale=inf: must be a finite number"),
            (["model.hidden=64"], "model.hidden=64: must be a list"),
            (["learner=er", "learner.er.size=2.0"], "learner.er.size=2.0: must be int"),
            (["learner=[ewc,er]", "learner.ewc.weight=0"], "learner.ewc.weight=0: must be number > 0"),
            (["client=3"], "client=3: must be a mapping"),
            (["client={lr: 3}"], "client={lr: 3}: no such key; did you mean client.optimizer.lr?"),
            (["device=tpu"], "device=tpu: must be one of auto, cpu, cuda"),
            (["seed=-1"], "seed=-1: must be int in [0, 4294967295]"),
            (["seed=1,2"], "seed=1,2: one run takes one value"),
            (["seed"], "seed: not an override"),
            (["seed=[1"], "seed=[1: not an override"),
            (["hydra.run.dir=x"], "hydra.run.dir=x: no such key"),
            (["clients_per_round=11"], "clients_per_round=11: must be <= num_clients=10"),
            (["clients_per_round=2", "min_replies=3"], "min_replies=3: must be <= 2"),
            (["rounds_per_task=0"], "rounds_per_task=0: must be int >= 1"),
            (["rounds_per_task=[]"], "rounds_per_task=[]: must be int >= 1"),
            (["rounds_per_task=[1,true]"], "rounds_per_task[1]=true: must be int >= 1"),
            (["rounds_per_task=[1,2]"], "rounds_per_task=[1, 2]: has 2 numbers for scenario.num_tasks=5"),
            (["name=../x"], "name=../x: must be letters"),
            (["exclude.classes=[-1]"], "exclude.classes[0]=-1: must be int >= 0"),
            (["exclude.clients=[1.5]"], "exclude.clients[0]=1.5: must be str or int >= 0"),
            (["experiment=typo"], "client.epoch=3: no such key"),
            (["experiment=unruly"], "client.epochs=0: must be int >= 1"),
        ],
    )
    def test_a_mistake_is_one_clear_line(self, overrides: list[str], message: str) -> None:
        with pytest.raises(ConfigError) as caught:
            compose(overrides)
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)

    def test_lists_of_rounds_and_nulls_pass(self) -> None:
        cfg = compose(["rounds_per_task=[1,2,3,4,5]", "clients_per_round=10", "compare_with=null", "run_dir=/tmp/x"])
        assert cfg["rounds_per_task"] == [1, 2, 3, 4, 5]
        assert cfg["compare_with"] is None

    def test_folders_of_ones_own(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        mine = write(tmp_path / "my own's", {"learner/mine": "# My own.\nmine: {_target_: own_module.Mine, beta: 1.0}"})
        (tmp_path / "own_module.py").write_text("class Mine: pass\n")
        cfg = compose(["learner=mine", "learner.mine.beta=2"], [mine])
        assert cfg["learner"]["mine"]["beta"] == 2.0
        assert cfg["trusted_packages"] == ["own_module"]
        assert "own_module" not in sys.modules
        assert list_choices("learner", [mine])[-1] == ("mine", "My own.")
        with pytest.raises(ConfigError, match="no such folder"):
            compose([], [tmp_path / "absent"])

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("weight: 1\n_allowed_: {weight: int => 1}", "learner._allowed_.weight=int => 1: not a rule"),
            ("weight: 1\n_allowed_: {wait: int}", "learner._allowed_.wait: no such parameter here; known: weight"),
            ("weight: 1\n_allowed_: int", "learner._allowed_=int: must be a mapping"),
            ("weight: 0\n_allowed_: {weight: int >= 1}", "learner.weight=0: must be int >= 1"),
            ("weight: [1", ""),
            ("weight: ???", "learner.weight"),
            ("weight: ${absent}", "absent"),
        ],
    )
    def test_a_wrong_file_is_named(self, configs: Path, text: str, message: str) -> None:
        write(configs, {"learner/wrong": text})
        with pytest.raises(ConfigError) as caught:
            compose(["learner=wrong"])
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)

    def test_a_value_that_must_be_given_can_be(self, configs: Path) -> None:
        write(configs, {"learner/asks": "weight: ???\n_allowed_: {weight: int >= 1}"})
        assert compose(["learner=asks", "learner.weight=2"])["learner"] == {"weight": 2}

    def test_choices_carry_their_first_comment(self) -> None:
        assert list_choices("learner") == [("er", "Replay."), ("ewc", "EWC."), ("finetune", "Nothing.")]
        assert ("bench", "A benchmark.") in list_choices("experiment")
        assert "strategy/projection" in kinds()
        with pytest.raises(ConfigError, match="learners: no such kind; did you mean learner"):
            list_choices("learners")


@pytest.mark.parametrize(
    ("rule", "good", "bad"),
    [
        ("int >= 1", [1, 7], [0, -1, 1.0, True, "1", None]),
        ("int in [0, 9]", [0, 9], [-1, 10]),
        ("number > 0", [1, 0.5, 1e-9], [0, -1.0, float("nan"), float("inf"), False]),
        ("number in (0, 1]", [1, 0.5], [0, 1.01]),
        ("number in [0, 1)", [0], [1]),
        ("number < 1e-3", [-5, 0.0009], [0.001]),
        ("number", [-5, 2.5], ["x", None]),
        ("int >= 1 or null", [None, 3], [0]),
        ("bool", [True, False], [0, 1, None]),
        ("str or null", ["", None], [0]),
        ("any", [None, [], {}, 3, "x"], []),
        (["official", "corrected"], ["official"], ["x", None, 0]),
        ([1, None], [1, None], [True, 1.0]),
    ],
)
def test_rules_accept_and_refuse(rule: Any, good: list[Any], bad: list[Any]) -> None:
    parsed = parse_rule(rule, "key")
    assert all(parsed.accepts(value) for value in good)
    assert not any(parsed.accepts(value) for value in bad)


@pytest.mark.parametrize(
    "rule", ["", "float", "int => 1", "int >= x", "bool > 0", "int in [0 9]", "int in [2, 1]", "int or none", [], 3, {}]
)
def test_malformed_rules_name_their_place(rule: Any) -> None:
    with pytest.raises(ConfigError, match=r"^scenario\._allowed_\.x="):
        parse_rule(rule, "scenario._allowed_.x")


@given(low=st.integers(-1000, 1000), size=st.integers(0, 100), value=st.integers(-2000, 2000))
def test_int_intervals_agree_with_arithmetic(low: int, size: int, value: int) -> None:
    assert parse_rule(f"int in [{low}, {low + size}]", "k").accepts(value) == (low <= value <= low + size)
    assert parse_rule(f"number in ({low}, {low + size})", "k").accepts(value) == (low < value < low + size)


def test_conform_recurses_into_free_mappings() -> None:
    assert conform({"a": {"x": 1, "_allowed_": {}}}, {"a": {}}) == {"a": {"x": 1}}


def test_diff_hash_and_yaml() -> None:
    old = {"a": {"b": 1, "c": [1]}, "d": None}
    new = {"d": None, "a": {"c": [1, 2], "b": 1.0}, "e": True}
    assert diff(old, new) == ["a.b: 1 -> 1.0", "a.c: [1] -> [1, 2]", "e: (absent) -> true"]
    assert diff(old, old) == []
    assert config_hash(old) == config_hash({"d": None, "a": {"c": [1], "b": 1}})
    assert config_hash(old) != config_hash(new)
    assert len(config_hash(old)) == 64
    assert to_yaml({"b": 1, "a": {"c": None}}) == "b: 1\na:\n  c: null\n"


PLUGIN = """
import os

class Part:
    def __init__(self, *, size, rate=0.5, seed=0):
        if size < 0:
            raise ValueError(f"part.size={size}: must be >= 0")
        self.size, self.rate, self.seed = size, rate, seed

def scale(x, *, by):
    return x * by

CONSTANT = 3
"""


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    name = f"plugin_{abs(hash(tmp_path))}"
    (tmp_path / f"{name}.py").write_text(PLUGIN)
    monkeypatch.syspath_prepend(tmp_path)
    return name


class TestBuild:
    def test_classes_are_called_and_functions_bound(self, plugin: str) -> None:
        part = build({"_target_": f"{plugin}.Part", "size": 3, "rate": {"_target_": "x.Y"}}, trusted=[plugin], seed=7)
        assert (part.size, part.rate, part.seed) == (3, {"_target_": "x.Y"}, 7)
        assert build({"_target_": f"{plugin}.scale", "by": 4}, trusted=[plugin])(2) == 8

    @pytest.mark.parametrize(
        ("node", "message"),
        [
            ({"_target_": "P.Part", "size": 1, "sise": 2}, r"^learner\.er\.sise: no such parameter.*takes size, rate"),
            ({"_target_": "P.Part"}, r"^learner\.er\.size: .* needs this parameter; it takes size, rate"),
            ({"_target_": "P.Part", "size": 1, "seed": 2}, r"^learner\.er\.seed: set by the run itself"),
            ({"_target_": "P.Part", "size": -1}, r"^part\.size=-1: must be >= 0$"),
            ({"_target_": "P.Absent"}, "has no Absent"),
            ({"_target_": "P.CONSTANT"}, "must be a class, a function or a class method"),
            ({"_target_": "P"}, "must be a dotted path"),
            ({"_target_": "P.os.system"}, "not trusted|must be a class"),
            ({"size": 1}, "has no _target_"),
            ({"_target_": "fedcl.absent.Name"}, "has no absent"),
        ],
    )
    def test_mistakes_name_the_key(self, plugin: str, node: dict[str, Any], message: str) -> None:
        node = {
            key: value.replace("P", plugin, 1) if key == "_target_" and value[0] == "P" else value
            for key, value in node.items()
        }
        with pytest.raises(ConfigError, match=message) as caught:
            build(node, at="learner.er", trusted=[plugin], seed=1)
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize(
        "target",
        [
            "torch.load", "os.system", "posix.system", "subprocess.Popen", "builtins.eval", "pickle.loads",
            "shutil.rmtree", "fedcl.cli.sys.exit", "fedcl.cli.traceback.print_exc",
            "fedcl.config.own_code.os.system", "fedcl.config.compose.copy.deepcopy",
            "fedcl.config.instantiate.importlib.import_module", "fedcl.config.compose.Path",
        ],
    )  # fmt: skip
    def test_only_trusted_code_is_called(self, target: str) -> None:
        with pytest.raises(ConfigError, match=r"not trusted|must be a class"):
            build({"_target_": target}, at="model")

    def test_a_missing_library_is_not_a_missing_target(self, tmp_path: Path, plugin: str) -> None:
        (tmp_path / f"{plugin}_b.py").write_text("import surely_not_installed\n")
        with pytest.raises(ConfigError, match="needs the package 'surely_not_installed', which is not installed"):
            locate(f"{plugin}_b.Name", [f"{plugin}_b"])


def test_only_modules_directly_in_the_folder_are_plugins(tmp_path: Path) -> None:
    packages = tmp_path / ".venv/lib/site-packages"
    packages.mkdir(parents=True)
    (packages / "below_here.py").touch()
    (tmp_path / "own_one.py").touch()
    (tmp_path / "own_two").mkdir()
    (tmp_path / "own_two/__init__.py").touch()
    (tmp_path / "json.py").touch()
    targets = ["own_one.A", "own_two.b.C", "below_here.D", "json.loads", "torch.load", "fedcl.x.Y", "absent.Z"]
    assert plugin_packages(targets, [tmp_path]) == ["own_one", "own_two"]


def test_the_built_in_run_composes() -> None:
    cfg = compose([])
    assert {"data", "scenario", "model", "learner", "strategy", "backend"} <= cfg.keys()
    assert "_allowed_" not in everything(cfg)


@pytest.mark.parametrize("file", sorted(REAL.rglob("*.yaml")), ids=lambda file: file.relative_to(REAL).as_posix())
def test_every_file_says_what_it_is(file: Path) -> None:
    lines = [line for line in file.read_text().splitlines() if not line.startswith("# @package")]
    assert lines[0].startswith("# ")
    assert len(lines[0]) <= 120
