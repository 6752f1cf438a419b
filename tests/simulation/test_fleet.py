"""Devices with their own files: the real client app, one message at a time, over a grid as lossy as Flower's."""

from __future__ import annotations

import importlib.util
import json
import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from flwr.app import Context, RecordDict

from fedcl import __version__, server_app
from fedcl.assembly import load_dataset, split_dataset
from fedcl.client.device_state import DeviceStateStore
from fedcl.config.compose import compose
from fedcl.config.value_rules import ConfigError
from fedcl.messages import hello_reply
from fedcl.models.networks import MLP, build_model
from fedcl.results import load
from fedcl.runs.experiment import resume, run
from fedcl.runs.verify import verify
from fedcl.simulation.compat import identity
from fedcl.simulation.nodes import (
    SERVER_FOLDER,
    bind_node,
    forget_refusals,
    note_refusal,
    open_nodes,
    refusals,
    write_order,
)

_FILE = Path(__file__).with_name("fleet_of_devices.py")
_SPEC = importlib.util.spec_from_file_location("fleet_of_devices", _FILE)
assert _SPEC is not None
assert _SPEC.loader is not None
fleet_of_devices: Any = importlib.util.module_from_spec(_SPEC)
sys.modules["fleet_of_devices"] = fleet_of_devices
_SPEC.loader.exec_module(fleet_of_devices)

SHORT = ["num_clients=3", "rounds_per_task=2", "scenario.num_tasks=2", "learner=[ewc,er]", "figures=false"]
DEVICES = ["backend=flower", "data/partition=local", "compare_with=null", "checkpoint.min_seconds=0"]


@pytest.fixture(autouse=True)
def _identity() -> Iterator[None]:
    with identity(fleet_of_devices.RUN_ID):
        yield


@pytest.fixture
def devices(tmp_path: Path) -> dict[str, Path]:
    """Return the specs of three devices that hold what a simulation's three clients hold."""
    cfg = compose([*SHORT, "data.partition.alpha=0.3"])
    dataset = load_dataset(cfg)
    return dict(fleet_of_devices.write_devices(tmp_path / "devices", dataset, split_dataset(cfg, dataset)))


def grid_of(specs: dict[str, Path], overrides: list[str], **more: Any) -> Any:
    settings = {"overrides": shlex.join(overrides), "run": "r1", "attempt": 0} | more
    return fleet_of_devices.DirectGrid({100 + i: spec for i, spec in enumerate(specs.values())}, settings)


def run_app(grid: Any, settings: dict[str, Any]) -> None:
    server_app.app(grid, Context(fleet_of_devices.RUN_ID, 1, {}, RecordDict(), settings))


def on_devices(grid: Any, overrides: list[str]) -> Path:
    return run(compose(overrides), overrides, [], quiet=True, grid=grid)


def test_three_files_give_the_numbers_of_one_simulation(
    tmp_path: Path,
    devices: dict[str, Path],
    run_experiment: Callable[..., Path],
    metrics_hash: Callable[[Path], str],
) -> None:
    inline = run_experiment("inline", *SHORT, "data.partition.alpha=0.3")
    overrides = [*SHORT, *DEVICES, f"run_dir={tmp_path / 'run'}"]
    grid = grid_of(devices, overrides)
    folder = on_devices(grid, overrides)
    assert metrics_hash(folder) == metrics_hash(inline)
    assert {kind for _, kind in grid.seen} >= {"hello", "train", "task_end"}
    states = sorted(path.name for path in (devices["1"].parent / "state" / "r1" / "1").iterdir())
    assert states


@pytest.mark.slow
def test_a_device_that_is_away_costs_its_replies_and_comes_back_as_another_node(
    tmp_path: Path, devices: dict[str, Path]
) -> None:
    overrides = [*SHORT, *DEVICES, f"run_dir={tmp_path / 'run'}", "learner=er"]
    grid = grid_of(devices, overrides)
    push, trained = grid.push_messages, []

    def watched(messages: Any) -> list[str]:
        kept = list(messages)
        kinds = [str(one.content.config_records["fedcl"]["kind"]) for one in kept]
        trained.extend(one.metadata.dst_node_id for one, kind in zip(kept, kinds, strict=True) if kind == "train")
        if len(trained) == 4:
            grid.away.add(101)
        if len(trained) == 7:
            grid.specs[205] = grid.specs[101]
        return list(push(kept))

    grid.push_messages = watched
    folder = on_devices(grid, overrides)
    events = load(folder).events
    failed = events[events["kind"] == "client_failed"]
    assert set(failed["client"]) == {"1"}
    assert 1 <= (failed["message"] == "train").sum() <= 2
    assert 205 in trained
    assert load(folder).status == "done"


@pytest.mark.slow
def test_a_device_that_is_back_at_once_has_lost_what_it_worked_on(
    tmp_path: Path, devices: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides = [*SHORT, *DEVICES, f"run_dir={tmp_path / 'run'}", "learner=finetune", "strategy/projection=none"]
    grid = grid_of(devices, overrides)
    push, lost = grid.push_messages, []

    def watched(messages: Any) -> list[str]:
        ids = list(push(messages))
        node, kind = grid.seen[-1]
        if (node, kind) == (101, "train") and not lost:
            lost.append(grid._replies.pop(ids[-1]))  # killed, and started again before anybody noticed
        return ids

    grid.push_messages = watched
    monkeypatch.setattr("fedcl.simulation.fleet.PROBE_SECONDS", 0.2)
    folder = on_devices(grid, overrides)
    events = load(folder).events
    failed = events[events["kind"] == "client_failed"]
    assert failed[["client", "round"]].to_numpy().tolist() == [["1", 0]]
    assert failed["reason"].str.contains("started again").all()
    assert load(folder).status == "done"


@pytest.mark.slow
def test_a_run_is_resumed_with_the_states_that_devices_kept(
    tmp_path: Path, devices: dict[str, Path], metrics_hash: Callable[[Path], str]
) -> None:
    whole = [*SHORT, *DEVICES, f"run_dir={tmp_path / 'whole'}"]
    straight = on_devices(grid_of(devices, whole, run="straight"), whole)
    overrides = [*SHORT, *DEVICES, f"run_dir={tmp_path / 'run'}"]
    grid = grid_of(devices, overrides)
    push = grid.push_messages

    def dying(messages: Any) -> list[str]:
        kept = list(messages)
        if sum(kind == "train" for _, kind in grid.seen) >= 7:
            raise RuntimeError("the server's machine is gone")
        return list(push(kept))

    grid.push_messages = dying
    with pytest.raises(RuntimeError, match="machine is gone"):
        on_devices(grid, overrides)
    again = grid_of(devices, overrides, attempt=1)
    resume(tmp_path / "run", force=False, quiet=True, grid=again)
    assert metrics_hash(tmp_path / "run") == metrics_hash(straight)


def test_a_client_that_leaves_erases_its_state_on_its_device(tmp_path: Path, devices: dict[str, Path]) -> None:
    ask = "unlearning.requests=[{id: bye, scope: client, clients: [1], at: {round: 2}}]"
    overrides = [*SHORT, *DEVICES, f"run_dir={tmp_path / 'run'}", "unlearner=continue_without", ask]
    grid = grid_of(devices, overrides)
    on_devices(grid, overrides)
    assert not list((devices["1"].parent / "state").rglob("*.safetensors"))
    assert list((devices["0"].parent / "state").rglob("*.safetensors"))
    after = [kind for node, kind in grid.seen if node == 101]
    assert after[-1] == "forget"


@pytest.mark.slow
def test_who_was_away_when_asked_to_forget_is_told_when_it_is_back(tmp_path: Path, devices: dict[str, Path]) -> None:
    bye, c3 = "id: bye, scope: client, clients: ['1']", "id: c3, scope: class, classes: [3]"
    asked = f"[{{{bye}, at: {{round: 2}}}}, {{{c3}, at: {{round: 2}}}}]"
    overrides = [*SHORT, *DEVICES, f"run_dir={tmp_path / 'run'}", "learner=er", "rounds_per_task=3"]
    overrides += ["unlearner=continue_without", f"unlearning.requests={asked}"]
    grid = grid_of(devices, overrides)
    push, trained = grid.push_messages, []

    def watched(messages: Any) -> list[str]:
        kept = list(messages)
        kinds = [str(one.content.config_records["fedcl"]["kind"]) for one in kept]
        trained.extend(kind for kind in kinds if kind == "train")
        if len(trained) == 7:
            grid.away.clear()  # while the round without them is played
        ids = list(push(kept))
        if len(trained) == 6:
            grid.away |= {101, 102}
        return ids

    grid.push_messages = watched
    folder = on_devices(grid, overrides)
    for file in sorted((folder / "certificates").glob("0*.json")):
        remains = [row["why"] for row in json.loads(file.read_text())["erasure"] if row["outcome"] == "retained"]
        assert any(text.startswith("client(s) 1 were not in reach: their devices are notified") for text in remains)
        assert any(text.startswith("client(s) 2 were") and text.endswith("they begin again") for text in remains)
    assert verify(folder)
    events = load(folder).events
    told = events[events["kind"] == "client_told"]
    assert told["client"].tolist() == ["1", "2"]
    assert set(told["round"]) == {3}
    assert [list(names) for names in told["requests"]] == [["bye", "c3"], ["c3"]]
    assert not list((devices["1"].parent / "state").rglob("*.safetensors"))
    after = [kind for node, kind in grid.seen if node == 102]
    assert after[after.index("forget") + 1] == "train"
    store = DeviceStateStore(devices["2"].parent / "state", "r1", "2")
    kept = sorted(int(f.stem.split("_")[1]) for f in (store.folder / "r1" / "2").glob("visit_*.safetensors"))
    assert kept[0] >= after[1:].index("forget")  # of what it kept before, nothing is left


@pytest.mark.slow
def test_a_run_that_a_client_has_left_is_resumed_without_waiting_for_it(
    tmp_path: Path, devices: dict[str, Path], metrics_hash: Callable[[Path], str]
) -> None:
    asked = "unlearning.requests=[{id: bye, scope: client, clients: ['1'], at: {round: 2}}]"
    given = [*SHORT, *DEVICES, "learner=er", "unlearner=continue_without", asked, "backend.join_seconds=1"]
    whole = [*given, f"run_dir={tmp_path / 'whole'}"]
    straight = on_devices(grid_of(devices, whole, run="straight"), whole)
    overrides = [*given, f"run_dir={tmp_path / 'run'}"]
    grid = grid_of(devices, overrides)
    push = grid.push_messages

    def dying(messages: Any) -> list[str]:
        if sum(kind == "train" for _, kind in grid.seen) >= 8:
            raise RuntimeError("the server's machine is gone")
        return list(push(messages))

    grid.push_messages = dying
    with pytest.raises(RuntimeError, match="machine is gone"):
        on_devices(grid, overrides)
    again = grid_of(devices, overrides, attempt=1)
    resume(tmp_path / "run", force=False, quiet=True, grid=again)
    assert metrics_hash(tmp_path / "run") == metrics_hash(straight)
    assert [kind for node, kind in again.seen if node == 101] == ["hello"]


MINE = "from clients.learners.er import ER\n\n\nclass Mine(ER):\n    pass\n"
YAML = "# Mine.\nmine:\n  _target_: mine_of_fleet.Mine\n  budget: 20\n  replay_size: null\n  policy: reservoir\n"


@pytest.mark.slow
def test_a_choice_of_ones_own_is_looked_up_by_its_name_on_each_side(
    tmp_path: Path, devices: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path])
    folder = tmp_path / "my"
    (folder / "learner").mkdir(parents=True)
    (folder / "learner" / "mine.yaml").write_text(YAML)
    (folder / "mine_of_fleet.py").write_text(MINE)
    for client in ("0", "1"):
        devices[client].write_text(devices[client].read_text() + f'config_dirs: ["{folder}"]\n')
    overrides = [*SHORT, *DEVICES, f"run_dir={tmp_path / 'run'}", "learner=mine", "backend.join_seconds=1"]
    grid = grid_of(devices, overrides, config_dirs=str(folder))
    with pytest.raises(ConfigError, match="learner=mine: no such choice"):
        run_app(grid, grid.run_config)  # device 2 has no such name
    devices["2"].write_text(devices["2"].read_text() + f'config_dirs: ["{folder}"]\n')
    again = [*overrides, f"run_dir={tmp_path / 'again'}"]
    grid = grid_of(devices, again, config_dirs=str(folder), run="r2")
    run_app(grid, grid.run_config)
    assert load(tmp_path / "again").status == "done"
    notes = json.loads((devices["2"].parent / "state" / "r2" / "2.notes" / "config.json").read_text())
    assert notes["config"]["trusted_packages"] == ["mine_of_fleet"]


def test_nodes_that_do_not_say_who_they_are_are_ignored_with_an_event(
    tmp_path: Path,
    devices: dict[str, Path],
    run_experiment: Callable[..., Path],
    metrics_hash: Callable[[Path], str],
) -> None:
    class Strangers(fleet_of_devices.DirectGrid):  # type: ignore[misc, name-defined]
        """From the start, and from the third train message on, also nodes that answer a hello with anything."""

        hellos: ClassVar = {300: RecordDict(), 301: hello_reply("../../x", 3, __version__)}

        def get_node_ids(self) -> list[int]:
            late = sum(kind == "train" for _, kind in self.seen) >= 3
            return [*super().get_node_ids(), 300, *([301] if late else [])]

        def _answer(self, node: int, message: Any) -> Any:
            return self.hellos[node] if node in self.hellos else super()._answer(node, message)

    plain = ["learner=finetune", "strategy/projection=none"]
    overrides = [*SHORT, *DEVICES, f"run_dir={tmp_path / 'run'}", *plain]
    grid = grid_of(devices, overrides)
    beset = on_devices(Strangers(grid.specs, grid.run_config), overrides)
    events = load(beset).events
    rejected = events[events["kind"] == "hello_rejected"]
    assert rejected["node"].tolist() == ["300", "301"]
    assert rejected["reason"].str.contains("not a reply to fedcl's hello|client id '../../x'").all()
    assert metrics_hash(beset) == metrics_hash(run_experiment("inline", *SHORT, *plain, "data.partition.alpha=0.3"))


def test_who_calls_itself_another_client_than_its_key_says_is_turned_away(
    tmp_path: Path, devices: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(SERVER_FOLDER, str(tmp_path))
    open_nodes(tmp_path, bound=True)
    for node, client in ((98, "2"), (99, "1"), (100, "0"), (101, "1"), (102, "2")):  # 98 and 99 have older keys
        bind_node(tmp_path, node, client)
    bind_node(tmp_path, 97, "7")
    overrides = [*SHORT, *DEVICES, f"run_dir={tmp_path / 'run'}", "learner=finetune", "strategy/projection=none"]
    grid = grid_of(devices, overrides)
    grid.specs |= {97: devices["0"], 98: devices["2"], 99: devices["0"]}  # they are asked before the others
    run = load(on_devices(grid, overrides))
    rejected = run.events[run.events["kind"] == "hello_rejected"].sort_values("node")
    said = dict(zip(rejected["node"], rejected["reason"], strict=True))
    assert said == {
        "97": "calls itself client 0, and has the key of client 7",
        "98": "calls itself client 2, and has a key that is nobody's",
        "99": "calls itself client 0, and has a key that is nobody's",
    }
    assert {node for node, kind in grid.seen if kind != "hello"} == {100, 101, 102}
    assert run.status == "done"


def test_a_server_that_names_a_path_on_a_device_is_refused_there(tmp_path: Path, devices: dict[str, Path]) -> None:
    overrides = [*SHORT, *DEVICES, f"run_dir={tmp_path / 'run'}"]
    grid = grid_of(devices, [*overrides, "model.pretrained=/any/path"])
    with pytest.raises(ConfigError, match=r"override 'model\.pretrained=/any/path'"):
        on_devices(grid, overrides)


def test_a_servers_process_does_what_was_written_down_there_and_nothing_else(
    tmp_path: Path, devices: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(SERVER_FOLDER, str(tmp_path))
    short = [*SHORT, *DEVICES, "learner=finetune", "strategy/projection=none"]
    grid = grid_of(devices, [*short, f"run_dir={tmp_path / 'theirs'}"])
    with pytest.raises(ConfigError, match="run='r1': this server has no such run"):
        run_app(grid, grid.run_config)
    write_order(tmp_path, "r1", {"overrides": shlex.join([*short, f"run_dir={tmp_path / 'ours'}"])})
    run_app(grid, grid.run_config)
    assert load(tmp_path / "ours").status == "done"
    assert not (tmp_path / "theirs").exists()


def test_why_a_reply_is_refused_is_an_event_and_a_line(
    tmp_path: Path, devices: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(SERVER_FOLDER, str(tmp_path))
    note_refusal(tmp_path, "1", "401 at push-messages: is its clock right?")
    overrides = [*SHORT, *DEVICES, f"run_dir={tmp_path / 'run'}", "learner=finetune", "strategy/projection=none"]
    run = load(on_devices(grid_of(devices, overrides), overrides))
    refused = run.events[run.events["kind"] == "reply_refused"]
    assert refused[["client", "reason"]].values.tolist() == [["1", "401 at push-messages: is its clock right?"]]
    said = [line.removeprefix("fleet: ") for line in capsys.readouterr().err.splitlines() if line.startswith("fleet: ")]
    joined = [f"{count}/3 devices joined" for count in (1, 2, 3)]
    error = "error: what client 1 sends is refused: 401 at push-messages: is its clock right?"
    assert said == [*joined, error, "first message sent", "first reply"]
    forget_refusals(tmp_path)
    assert refusals() == {}


def test_two_devices_of_one_name_are_refused(tmp_path: Path, devices: dict[str, Path]) -> None:
    devices["2"].write_text(devices["0"].read_text())
    overrides = [*SHORT, *DEVICES, f"run_dir={tmp_path / 'run'}"]
    with pytest.raises(ConfigError, match="two nodes call themselves client '0'"):
        on_devices(grid_of(devices, overrides), overrides)


def test_devices_with_the_base_give_the_numbers_of_one_simulation_and_one_with_another_is_refused(
    tmp_path: Path,
    devices: dict[str, Path],
    run_experiment: Callable[..., Path],
    metrics_hash: Callable[[Path], str],
) -> None:
    frozen = [*SHORT, "model.freeze=hidden", "model.hidden=[6]", f"model.pretrained={tmp_path / 'server.npz'}"]
    state = build_model(lambda: MLP(input_shape=(64,), heads=(10,), hidden=(6,)), seed=9).state_dict()
    body = {name: tensor.numpy() for name, tensor in state.items() if name.startswith("hidden")}
    np.savez(tmp_path / "server.npz", **body)  # type: ignore[arg-type]
    np.savez(tmp_path / "device.npz", **body)  # type: ignore[arg-type]
    np.savez(tmp_path / "other.npz", **{name: array + 1e-6 for name, array in body.items()})  # type: ignore[arg-type]
    plain = {client: spec.read_text() for client, spec in devices.items()}
    overrides = [*frozen, *DEVICES]
    for refused, file in (("sha256 [0-9a-f]{12}", "other.npz"), ("sha256 [0-9a-f]{12}", None)):
        for client, spec in devices.items():
            name = file if client == "2" else "device.npz"
            spec.write_text(plain[client] + (f"pretrained: {tmp_path / name}\n" if name else ""))
        again = [*overrides, f"run_dir={tmp_path / f'refused-{file}'}"]
        with pytest.raises(ConfigError, match=f"client 2 has another base than the server: {refused}.*pretrained in"):
            on_devices(grid_of(devices, [text for text in again if "pretrained" not in text]), again)
    for client, spec in devices.items():
        spec.write_text(plain[client] + f"pretrained: {tmp_path / 'device.npz'}\n")
    again = [*overrides, f"run_dir={tmp_path / 'run'}"]
    folder = on_devices(grid_of(devices, [text for text in again if "pretrained" not in text], run="r2"), again)
    assert metrics_hash(folder) == metrics_hash(run_experiment("inline", *frozen, "data.partition.alpha=0.3"))


def test_a_rehearsing_device_is_refused_by_a_run_on_own_data(tmp_path: Path, devices: dict[str, Path]) -> None:
    devices["2"].write_text('client: "2"\n')
    overrides = [*SHORT, *DEVICES, f"run_dir={tmp_path / 'run'}"]
    with pytest.raises(ConfigError, match=r"set data in client\.yaml"):
        on_devices(grid_of(devices, overrides), overrides)


def test_too_large_messages_and_replies_are_refused(tmp_path: Path, devices: dict[str, Path]) -> None:
    spec = devices["2"]
    spec.write_text(spec.read_text() + "max_message_mb: 1\n")
    overrides = [*SHORT, *DEVICES, f"run_dir={tmp_path / 'run'}", "model.hidden=[600,600]", "learner=finetune"]
    folder = on_devices(grid_of(devices, overrides), overrides)
    events = load(folder).events
    said = events[events["kind"] == "client_failed"]
    assert set(said["client"]) == {"2"}
    assert said["reason"].str.contains("max_message_mb=1 in client.yaml").all()
    tight = [*overrides[:-3], f"run_dir={tmp_path / 'tight'}", *overrides[-2:], "backend.max_message_mb=1"]
    tight += ["round_retries=0"]
    with pytest.raises(Exception, match="round"):
        on_devices(grid_of(devices, tight, run="r2"), tight)
    lines = (tmp_path / "tight" / "events.jsonl").read_text()
    assert "larger than backend.max_message_mb=1" in lines
