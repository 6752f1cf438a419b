from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from fedcl.client.device import (
    Agreement,
    DeviceData,
    DeviceSpec,
    device_overrides,
    read_spec,
    refuse_foreign_targets,
    relabel,
    sent_to_devices,
)
from fedcl.config.compose import CONFIG_DIR, compose, path_keys
from fedcl.config.instantiate import targets_in
from fedcl.config.value_rules import ConfigError
from fedcl.data.dataset import ArrayDataset, Dataset
from fedcl.scenario.task import Task


def spec_of(tmp_path: Path, text: str) -> DeviceSpec:
    (tmp_path / "client.yaml").write_text(text)
    return read_spec(tmp_path / "client.yaml")


def test_a_spec_is_read_and_its_paths_start_from_its_folder(tmp_path: Path) -> None:
    text = "client: 3\ndata: [data=npz, data.root=/x.npz]\nstate: kept\nmax_message_mb: 2\nconfig_dirs: [my, /own]\n"
    spec = spec_of(tmp_path, text)
    assert spec.config_dirs == (tmp_path / "my", Path("/own"))
    assert (spec.client, spec.data, spec.state) == ("3", ("data=npz", "data.root=/x.npz"), tmp_path / "kept")
    assert spec.max_message_bytes == 2 << 20
    assert spec.pretrained is None
    spec = spec_of(tmp_path, "client: 3\npretrained: body.npz\n")
    assert spec.pretrained == tmp_path / "body.npz"
    assert f'model.pretrained="{tmp_path / "body.npz"}"' in device_overrides([], spec, path_keys)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("client: ../a\n", "client='../a'"),
        ("client: a\nstate: 3\n", "state=3"),
        ("client: a\npretrained: [x]\n", "pretrained=['x']: must be a file"),
        ("client: a\ndata: [model=mlp]\n", "data: model=mlp"),
        ("client: a\ndata: [data.root=/x]\n", "one entry must be data=CHOICE"),
        ("client: a\nthread: 2\n", "thread: unknown key"),
        ("client: a\nthreads: 0\n", "threads=0: must be int >= 1"),
        ("client: a\ndevice: tpu\n", "device=tpu"),
        ("- a\n", "must be a mapping"),
        ("client: [\n", "is not valid YAML"),
    ],
)
def test_a_wrong_spec_is_refused_in_plain_words(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(ConfigError) as raised:
        spec_of(tmp_path, text)
    assert said in str(raised.value)


def test_a_missing_spec_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"client\.yaml: No such file"):
        read_spec(tmp_path / "client.yaml")


def test_a_device_takes_its_own_data_and_device_whatever_the_server_says(tmp_path: Path) -> None:
    spec = spec_of(tmp_path, "client: 0\ndata: [data=npz, data.root=/mine.npz]\ndevice: cpu\n")
    sent = ["data=mnist", "data/partition=local", "data.root=/etc", "device=cuda", "run_dir=/tmp/x", "learner=[er,ewc]"]
    taken = device_overrides(sent, spec, path_keys)
    assert "data.root=/mine.npz" in taken
    assert "learner=[er,ewc]" in taken
    assert not {"data=mnist", "data.root=/etc", "device=cuda", "run_dir=/tmp/x"} & set(taken)


@pytest.mark.parametrize(
    "sent",
    [
        "learner.er._target_=os.system",
        "model._target_=subprocess.Popen",
        "learner={er: {x: 1}}",
        "name_of.x=${oc.env:HOME}",
        "trusted_packages=[os]",
        "hydra.run.dir=/tmp",
        "~learner",
        "data.root=/etc/passwd",
        "data.root=passwd",
        "data.source.root=passwd",
        "model.pretrained=/any/path",
        "model.pretrained=any.safetensors",
        "+model.pretrained=any.safetensors",
        "model.pretrained='any.safetensors'",
        "learner.er.policy=$HOME",
        "learner.er.policy=~/x",
        "learner.er.policy='../x'",
        "learner.er.policy=[/x]",
    ],
)
def test_a_server_cannot_name_code_paths_or_secrets(tmp_path: Path, sent: str) -> None:
    spec = spec_of(tmp_path, "client: 0\n")
    with pytest.raises(ValueError, match=r"override|keys cannot be added"):
        device_overrides([sent], spec, path_keys)


NAMES_A_FILE = re.compile(r"(^|_)(root|path|paths|file|files|dir|dirs|folder|folders|cache|pretrained|weights|csv)$")


def test_every_key_of_every_yaml_that_names_a_file_says_so_in_its_rule() -> None:
    from fedcl.config.conform import SPECIAL, rules_of

    def keys(node: Any, place: str) -> Iterator[tuple[str, Any, str]]:
        rules = rules_of(node, place)
        for key, value in node.items():
            if key in SPECIAL or key in ("defaults", "_target_"):
                continue
            yield f"{place}.{key}", value, rules[key].text if key in rules else ""
            if isinstance(value, dict):
                yield from keys(value, f"{place}.{key}")

    declared, found = set(), set()
    for file in sorted(CONFIG_DIR.rglob("*.yaml")):
        if file.parent.name == "experiment":
            continue  # values for keys that other files declare
        for place, value, rule in keys(yaml.safe_load(file.read_text()) or {}, file.stem):
            texts = value if isinstance(value, list) else [value]
            looks = any(isinstance(text, str) and _looks_like_a_file(text) for text in texts)
            if NAMES_A_FILE.search(place.rpartition(".")[2]) or looks:
                found.add(place)
            if re.search(r"\bpath\b", rule):
                declared.add(place)
    assert found - declared == set()
    assert {"mlp.pretrained", "npz.root", "npz.source.root", "trace.path"} <= declared


def _looks_like_a_file(text: str) -> bool:
    return (
        text.startswith(("/", "./", "../", "~"))
        or re.search(r"\.(npz|csv|pt|safetensors|json|txt|yaml)$", text) is not None
    )


def test_a_server_sends_no_path(tmp_path: Path) -> None:
    given = [
        "model.pretrained=/any/path",
        "data=npz",
        "data.root=/srv/x.npz",
        "run_dir=/srv/run",
        "learner=er",
        "seed=1",
    ]
    assert sent_to_devices(given, path_keys(given)) == ["data=npz", "learner=er", "seed=1"]


def test_a_target_that_no_yaml_of_ours_has_is_refused() -> None:
    cfg = compose(["learner=[er,ewc]"])
    refuse_foreign_targets(targets_in(cfg), [CONFIG_DIR])
    with pytest.raises(ValueError, match=r"_target_=os\.system"):
        refuse_foreign_targets([*targets_in(cfg), "os.system"], [CONFIG_DIR])


def toy(classes: tuple[str, ...], y: list[int]) -> Dataset:
    labels = np.array(y, np.int64)
    half = ArrayDataset(np.arange(len(y) * 4, dtype=np.float32).reshape(len(y), 4), labels)
    return Dataset(half, half, classes)


def test_labels_are_agreed_by_name() -> None:
    agreed = Agreement(("ant", "bee", "cat", "dog"), (4,), True)
    seen = relabel(toy(("cat", "ant"), [0, 1, 1, 0]), Agreement.from_json(agreed.to_json()), "7")
    assert seen.train.y.tolist() == [2, 0, 0, 2]
    assert seen.num_classes == 4


def test_a_class_or_shape_of_ones_own_is_refused() -> None:
    with pytest.raises(ValueError, match=r"client 7: class 'eel' is unknown"):
        relabel(toy(("cat", "eel"), [0, 1]), Agreement(("ant", "cat"), (4,), True), "7")
    with pytest.raises(ValueError, match=r"client 7: samples of shape \(4,\)"):
        relabel(toy(("cat",), [0]), Agreement(("cat",), (5,), True), "7")


def test_a_device_must_be_set_up_for_the_kind_of_run() -> None:
    own = DeviceSpec("0", ("data=npz",), Path("/x"))
    with pytest.raises(ValueError, match="data/partition=local"):
        Agreement(("a",), (4,), False).check(own)
    with pytest.raises(ValueError, match=r"set data in client\.yaml"):
        Agreement(("a",), (4,), True).check(DeviceSpec("0", None, Path("/x")))


def test_device_data_has_positions_and_an_empty_task_where_classes_are_missing() -> None:
    data = DeviceData(
        relabel(toy(("cat", "ant"), [0, 1, 1, 0]), Agreement(("ant", "bee", "cat"), (4,), True), "7"), "7"
    )
    cpu = torch.device("cpu")
    task = Task(0, (0, 2), (0, 1))
    held = data.train("7", task, cpu)
    assert held.positions is not None
    assert held.positions.tolist() == [0, 1, 2, 3]
    assert len(data.train("7", Task(1, (1,), (2,)), cpu)) == 0
    without = data.train("7", Task(0, (0, 2), (0, 1), without_samples=(1, 3)), cpu)
    assert without.positions is not None
    assert without.positions.tolist() == [0, 2]
    data.drop("7")
    assert data.num_examples("7") == 4
