"""A real device: its owner's settings, and its own samples under the run's global labels."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from fedcl.client.local_data import PartitionedData
from fedcl.config.value_rules import ConfigError
from fedcl.contracts.fields import CLIENT_ID
from fedcl.data.dataset import ArrayDataset, Dataset, Partition

_KEYS = (
    "client", "data", "state", "device", "threads", "max_message_mb", "trusted_packages", "config_dirs", "pretrained",
)  # fmt: skip
_KEY = re.compile(r"[a-z_][a-z0-9_]*([./][a-z_][a-z0-9_]*)*")
_PLACE = re.compile(r"""\W*(/|~|\.{1,2}/|[A-Za-z]:/)""")  # the beginning of a path
_TARGET = re.compile(r"^\s*_target_:\s*(\S+)", re.MULTILINE)
# what the server or the device decides for itself: not taken from the other side
_NOT_FOR_DEVICES = (
    "name", "run_dir", "backend", "figures", "compare_with", "checkpoint", "unlearning", "device", "devices",
    "protocol", "async", "min_replies", "round_retries", "max_update_norm",
)  # fmt: skip


@dataclass(frozen=True)
class DeviceSpec:
    """A device's ``client.yaml``.

    ``client`` is the id of its state. ``data`` are overrides of the config group ``data`` (``data=npz``,
    ``data.root=/home/pi/samples.npz``); None for a rehearsal, in which each device takes its part of the run's data.
    ``state`` is the folder of client state, ``device`` cpu, cuda or auto. ``config_dirs`` are the owner's folders with
    further configurations, whose names a run may use. ``pretrained`` is a file of weights: a fixed body is not sent, so
    that each device needs the run's own (None: the run has none).
    """

    client: str
    data: tuple[str, ...] | None
    state: Path
    device: str = "auto"
    threads: int = 1
    max_message_bytes: int = 1 << 29
    trusted_packages: tuple[str, ...] = ()
    config_dirs: tuple[Path, ...] = ()
    pretrained: Path | None = None


def read_spec(path: Path) -> DeviceSpec:
    """Read a ``client.yaml``; relative paths in ``state``, ``config_dirs`` and ``pretrained`` start from its folder.

    Raises
    ------
    ConfigError
        One line naming the file, the key, the value and what is allowed.
    """
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: must be a mapping with the keys {', '.join(_KEYS)}")
    unknown = sorted(str(key) for key in raw if key not in _KEYS)
    if unknown:
        raise ConfigError(f"{path}: {unknown[0]}: unknown key; must be one of {', '.join(_KEYS)}")
    client, data, state = str(raw.get("client", "")), raw.get("data"), raw.get("state", "state")
    if not CLIENT_ID.fullmatch(client):
        raise ConfigError(
            f"{path}: client={client!r}: must be 1 to 128 of A-Z a-z 0-9 . _ -, and start with a letter or digit"
        )
    if not isinstance(state, str):
        raise ConfigError(f"{path}: state={state}: must be a folder")
    weights = raw.get("pretrained")
    if weights is not None and not isinstance(weights, str):
        raise ConfigError(f"{path}: pretrained={weights}: must be a file")
    megabytes, threads = _number(path, raw, "max_message_mb", 512), _number(path, raw, "threads", 1)
    if raw.get("device", "auto") not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"{path}: device={raw['device']}: must be auto, cpu or cuda")
    trusted = _texts(path, raw.get("trusted_packages") or [], "trusted_packages")
    folders = _texts(path, raw.get("config_dirs") or [], "config_dirs")
    return DeviceSpec(
        client=client,
        data=None if data is None else _data(path, data),
        state=(path.parent / Path(state).expanduser()).resolve(),
        device=raw.get("device", "auto"),
        threads=threads,
        max_message_bytes=megabytes << 20,
        trusted_packages=trusted,
        config_dirs=tuple((path.parent / Path(folder).expanduser()).resolve() for folder in folders),
        pretrained=None if weights is None else (path.parent / Path(weights).expanduser()).resolve(),
    )


def _number(path: Path, raw: Mapping[str, Any], key: str, default: int) -> int:
    value = raw.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"{path}: {key}={value}: must be int >= 1")
    return value


def _texts(path: Path, value: Any, key: str) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise ConfigError(f"{path}: {key}={value}: must be a list of strings")
    return tuple(value)


def _data(path: Path, value: Any) -> tuple[str, ...]:
    overrides = _texts(path, value, "data")
    for text in overrides:
        if not re.match(r"data(=|\.)", text):
            raise ConfigError(f"{path}: data: {text}: must be data=CHOICE or data.KEY=VALUE")
    if not any(text.startswith("data=") for text in overrides):
        raise ConfigError(f"{path}: data: one entry must be data=CHOICE, such as data=npz or data=folder")
    return overrides


def sent_to_devices(overrides: Sequence[str], paths: Collection[str]) -> list[str]:
    """Return those of a run's overrides that concern devices, without the keys in ``paths``."""
    keys = [text.lstrip("+").partition("=")[0].strip() for text in overrides]
    return [
        text
        for key, text in zip(keys, overrides, strict=True)
        if re.split(r"[./]", key)[0] not in _NOT_FOR_DEVICES and key not in paths
    ]


def device_overrides(
    sent: Sequence[str], spec: DeviceSpec, path_keys: Callable[[Sequence[str], Sequence[Path]], Collection[str]]
) -> list[str]:
    """Return the overrides of a run that this device accepts, which are names and plain values, and its own.

    The data are the device's own if its ``client.yaml`` says so. Nothing from the wire may name a path on the device, a
    module or a ``_target_``. ``path_keys`` is :func:`fedcl.config.compose.path_keys`.

    Raises
    ------
    ValueError
        If a server must not send one of the overrides.
    """
    taken = []
    for text in sent_to_devices(sent, ()):
        key, sign, value = text.lstrip("+").partition("=")
        top = re.split(r"[./]", key)[0]
        if top == "data" and spec.data is not None:
            continue
        if not sign or not _KEY.fullmatch(key) or top in ("trusted_packages", "hydra") or "_target_" in text:
            raise ValueError(f"override {text!r}: no server may set this on a device")
        if any(sign in value for sign in ("{", "$", "\\")) or _PLACE.match(value):
            raise ValueError(f"override {text!r}: a device takes names and plain values only")
        taken.append(text)
    paths = path_keys(taken, spec.config_dirs)
    for text in taken:
        if text.lstrip("+").partition("=")[0] in paths:
            raise ValueError(f"override {text!r}: no server may name a path on a device")
    own = [*(spec.data or ()), f"device={spec.device}", "compare_with=null", "backend=flower"]
    own += [] if spec.pretrained is None else [f"model.pretrained={json.dumps(str(spec.pretrained))}"]
    return [*taken, *own, f"trusted_packages=[{','.join(spec.trusted_packages)}]"]


def refuse_foreign_targets(targets: Sequence[str], config_dirs: Sequence[Path]) -> None:
    """Reject a composed configuration with a ``_target_`` that no YAML file in this device's own folders names.

    Raises
    ------
    ValueError
        Naming the ``_target_``.
    """
    files = [file for folder in config_dirs for file in folder.rglob("*.yaml")]
    own = {name for file in files for name in _TARGET.findall(file.read_text(encoding="utf-8"))}
    foreign = sorted(set(targets) - own)
    if foreign:
        raise ValueError(f"_target_={foreign[0]}: is in none of this device's own configurations")


@dataclass(frozen=True)
class Agreement:
    """What server and device agree on before a run: global class names in the order of labels, a sample's shape.

    ``local`` says that devices bring their own data, ``base`` is the digest of the fixed tensors of the server's model.
    """

    classes: tuple[str, ...]
    input_shape: tuple[int, ...]
    local: bool
    base: str = ""

    def to_json(self) -> str:
        """Return it as the JSON of the hello message."""
        raw = {"classes": list(self.classes), "input_shape": list(self.input_shape), "local": self.local}
        raw |= {"base": self.base} if self.base else {}
        return json.dumps(raw, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> Agreement:
        """Read what :meth:`to_json` wrote.

        Raises
        ------
        ValueError
            If the text is anything else.
        """
        try:
            raw = json.loads(text)
            classes, shape = tuple(map(str, raw["classes"])), tuple(map(int, raw["input_shape"]))
            return cls(classes, shape, bool(raw["local"]), str(raw.get("base", "")))
        except (KeyError, TypeError, json.JSONDecodeError) as error:
            raise ValueError("the message does not say which classes the run has") from error

    def check(self, spec: DeviceSpec) -> None:
        """Reject a run whose kind of data this device is not set up for.

        Raises
        ------
        ValueError
            If the run needs devices' own data and this device names none, or the other way round.
        """
        if self.local and spec.data is None:
            raise ValueError(f"client {spec.client}: the run needs devices' own data; set data in client.yaml")
        if not self.local and spec.data is not None:
            raise ValueError(f"client {spec.client}: has data of its own; the run must say data/partition=local")


def relabel(dataset: Dataset, agreed: Agreement, client: str) -> Dataset:
    """Return a device's data under the run's global labels; classes are matched by name.

    Raises
    ------
    ValueError
        If the device has a class that the run does not know, or samples of another shape.
    """
    if tuple(dataset.input_shape) != agreed.input_shape:
        raise ValueError(f"client {client}: samples of shape {dataset.input_shape}, the run has {agreed.input_shape}")
    label_of = {name: label for label, name in enumerate(agreed.classes)}
    unknown = [name for name in dataset.classes if name not in label_of]
    if unknown:
        known = ", ".join(agreed.classes[:10])
        raise ValueError(f"client {client}: class {unknown[0]!r} is unknown to the run, which has {known}")
    to_global = np.array([label_of[name] for name in dataset.classes], np.int64)

    def half(part: ArrayDataset) -> ArrayDataset:
        y: NDArray[np.int64] = to_global[part.y] if len(part.y) else part.y
        return ArrayDataset(part.x, y, part.meta)

    return Dataset(half(dataset.train), half(dataset.test), agreed.classes, dataset.scale, dataset.mean, dataset.std)


class DeviceData(PartitionedData):
    """All samples of one device's own files; forget requests refer to their positions.

    ``drop`` erases cached copies; the files belong to the owner, and stay.
    """

    def __init__(self, dataset: Dataset, client: str) -> None:
        halves = (np.arange(len(dataset.train), dtype=np.int64), np.arange(len(dataset.test), dtype=np.int64))
        super().__init__(dataset, Partition((halves[0],), (halves[1],)), (client,))
