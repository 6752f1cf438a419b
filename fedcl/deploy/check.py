"""Checks a fleet's folder: versions, commands, certificates, keys, ports, data."""

from __future__ import annotations

import datetime
import importlib.metadata
import re
import shutil
import socket
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from fedcl.client.device import DeviceSpec, read_spec
from fedcl.config.value_rules import ConfigError
from fedcl.deploy.bundle import KEY, TRUSTED, is_trusted
from fedcl.deploy.certificates import general_name
from fedcl.deploy.layout import Fleet
from fedcl.deploy.processes import environment, refusal, unreachable

FLOWER = ("1.41", "1.42")
_SERVER = re.compile(r"--superlink \[?([^\s\]]+)\]?:(\d+)")
_SOON = datetime.timedelta(days=14)


@dataclass(frozen=True, slots=True)
class Finding:
    """The result of one check; ``wrong`` says that the fleet cannot run like this."""

    text: str
    wrong: bool = False


def check(folder: Path) -> list[Finding]:
    """Check a fleet's folder, or one device's, which holds a ``client.yaml``.

    Raises
    ------
    ConfigError
        If it is neither.
    """
    if (folder / "client.yaml").is_file():
        return [*_software(), *_device(folder, None), *_way(folder)]
    fleet = Fleet.load(folder)
    findings = [*_software(), *_server(fleet)]
    for name in fleet.devices:
        if fleet.device(name).is_dir():
            findings += _device(fleet.device(name), fleet)
        else:
            findings.append(Finding(f"device {name}: its folder has been moved to the device; check it there"))
    return findings


def _software() -> Iterator[Finding]:
    version = importlib.metadata.version("flwr")
    right = version.startswith(tuple(f"{one}." for one in FLOWER))
    wanted = "" if right else f": must be {' or '.join(f'{one}.*' for one in FLOWER)}, on the server and on each device"
    yield Finding(f"flwr {version}{wanted}", not right)
    for command in ("flwr", "flower-superexec", "flower-supernode"):
        if shutil.which(command, path=environment()["PATH"]) is None:
            yield Finding(f"{command}: no such command; install fedcl, and put its environment's bin on PATH", True)


def _server(fleet: Fleet) -> Iterator[Finding]:
    if fleet.insecure:
        yield Finding("INSECURE: no TLS, no authentication; anybody in this network can read along and join in")
    else:
        yield from _certificates(fleet)
        yield from _keys(fleet)
    yield from _bundle(fleet)
    yield from _port(fleet)


def _certificates(fleet: Fleet) -> Iterator[Finding]:
    files = {name: fleet.server / name for name in ("ca.crt", "server.crt", "server.key")}
    missing = [file for file in files.values() if not file.is_file()]
    if missing:
        for file in missing:
            yield Finding(f"{file}: is missing; PEM", True)
        return
    try:
        authority = x509.load_pem_x509_certificate(files["ca.crt"].read_bytes())
        certificate = x509.load_pem_x509_certificate(files["server.crt"].read_bytes())
        key = serialization.load_pem_private_key(files["server.key"].read_bytes(), password=None)
    except (ValueError, TypeError) as error:
        yield Finding(f"{fleet.server}: ca.crt, server.crt or server.key is damaged: {error}", True)
        return
    if _encoded(certificate.public_key()) != _encoded(key.public_key()):
        yield Finding("server.key: is not the key of server.crt", True)
    yield from _dates("ca.crt", authority)
    yield from _dates("server.crt", certificate)
    try:
        certificate.verify_directly_issued_by(authority)
    except (InvalidSignature, ValueError, TypeError):
        yield Finding("server.crt: was not signed by ca.crt", True)
    if general_name(fleet.address) not in _names(certificate):
        said = ", ".join(str(name.value) for name in _names(certificate)) or "none"
        yield Finding(f"server.crt: is not for {fleet.address}, which devices connect to; its names: {said}", True)
    yield from _private(files["server.key"])


def _encoded(key: Any) -> bytes:
    form = serialization.PublicFormat.SubjectPublicKeyInfo
    encoded: bytes = key.public_bytes(serialization.Encoding.DER, form)
    return encoded


def _names(certificate: x509.Certificate) -> list[x509.GeneralName]:
    try:
        return list(certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value)
    except x509.ExtensionNotFound:
        return []


def _dates(name: str, certificate: x509.Certificate) -> Iterator[Finding]:
    now = datetime.datetime.now(datetime.UTC)
    start, end = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    if now > end:
        yield Finding(f"{name}: expired on {end:%Y-%m-%d}", True)
    elif now < start:
        yield Finding(f"{name}: is valid from {start:%Y-%m-%d} on; is this machine's clock right?", True)
    else:
        yield Finding(f"{name}: valid until {end:%Y-%m-%d}" + (", which is soon" if end - now < _SOON else ""))


def _private(file: Path) -> Iterator[Finding]:
    if file.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO):
        yield Finding(f"{file}: others can read this secret; chmod 600 {file}", True)


def _bundle(fleet: Fleet) -> Iterator[Finding]:
    for name in fleet.devices:
        file = fleet.device(name) / TRUSTED
        if file.is_file() and not is_trusted(fleet.server, file):
            why = "its server's bundle was not signed by that key; it will run nothing"
            yield Finding(f"device {name}: {TRUSTED}: {why}", True)
    if (fleet.ca / KEY).is_file():
        yield from _private(fleet.ca / KEY)


def _keys(fleet: Fleet) -> Iterator[Finding]:
    for name in fleet.devices:
        if not (fleet.server / "keys" / f"{name}.pub").is_file():
            yield Finding(f"device {name}: server/keys/{name}.pub is missing; it will be refused", True)


def _port(fleet: Fleet) -> Iterator[Finding]:
    why = unreachable(fleet)
    if why is None:
        control = refusal("127.0.0.1", fleet.control_port, None)
        yield Finding(
            control or f"the server answers at {fleet.where}, and at {fleet.control} here", control is not None
        )
        return
    if not why.startswith("nothing listens"):
        yield Finding(why, True)
        return
    for host, port in (("", fleet.port), ("127.0.0.1", fleet.control_port)):
        with socket.socket() as probe:
            try:
                probe.bind((host, port))
            except OSError as error:
                yield Finding(f"port {port} cannot be used: {error.strerror}", True)
                return
    yield Finding(f"{why}: the server is not started, its ports are free")


def _device(folder: Path, fleet: Fleet | None) -> Iterator[Finding]:
    try:
        spec = read_spec(folder / "client.yaml")
    except ConfigError as error:
        yield Finding(str(error), True)
        return
    if not (folder / TRUSTED).is_file():
        yield Finding(f"device {spec.client}: {folder / TRUSTED} is missing", True)
    if fleet is None or not fleet.insecure:
        yield from _device_key(folder, spec, fleet)
    if spec.state.exists() and not spec.state.is_dir():
        yield Finding(f"device {spec.client}: state={spec.state}: must be a folder", True)
    for folder in spec.config_dirs:
        if not folder.is_dir():
            yield Finding(f"device {spec.client}: config_dirs: {folder}: no such folder", True)
    yield _data(spec)


def _way(folder: Path) -> Iterator[Finding]:
    """Check that the server can be reached from here, as the device's start command would."""
    script = folder / "start.sh"
    found = _SERVER.search(script.read_text(encoding="utf-8")) if script.is_file() else None
    if found is None:
        yield Finding(f"{script}: does not say where the server is: --superlink HOST:PORT", True)
        return
    authority = folder / "ca.crt"
    why = refusal(found[1], int(found[2]), authority if authority.is_file() else None)
    yield Finding(why or f"the server answers at {found[1]}:{found[2]}", why is not None)


def _device_key(folder: Path, spec: DeviceSpec, fleet: Fleet | None) -> Iterator[Finding]:
    for name in ("ca.crt", "key"):
        if not (folder / name).is_file():
            yield Finding(f"device {spec.client}: {folder / name} is missing", True)
            return
    try:
        key = serialization.load_ssh_private_key((folder / "key").read_bytes(), password=None)
    except (ValueError, TypeError) as error:
        yield Finding(f"device {spec.client}: key is damaged: {error}", True)
        return
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        yield Finding(f"device {spec.client}: key: must be an elliptic-curve key", True)
    yield from _private(folder / "key")
    if fleet is None:
        return
    if (folder / "ca.crt").read_bytes() != (fleet.server / "ca.crt").read_bytes():
        yield Finding(f"device {spec.client}: its ca.crt is not the server's", True)
    public = fleet.server / "keys" / f"{spec.client}.pub"
    encoded = key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    if public.is_file() and public.read_bytes().split()[:2] != encoded.split()[:2]:
        yield Finding(f"device {spec.client}: server/keys/{public.name} belongs to another key", True)


def _data(spec: DeviceSpec) -> Finding:
    if spec.data is None:
        return Finding(f"device {spec.client}: rehearsal, takes its part of the data that the run names")
    from fedcl.assembly import load_dataset
    from fedcl.config.compose import compose
    from fedcl.config.own_code import add_plugin_paths

    try:
        add_plugin_paths(spec.config_dirs)
        dataset = load_dataset(compose(list(spec.data), spec.config_dirs))
    except ConfigError as error:
        return Finding(f"device {spec.client}: {error}", True)
    held = sorted({dataset.classes[label] for label in dataset.train.y.tolist()})
    text = f"{len(dataset.train)} samples of shape {dataset.input_shape}, classes {', '.join(held[:12])}"
    text = "; ".join([text, *dataset.notes])
    return Finding(f"device {spec.client}: {text}", wrong=len(dataset.train) == 0)
