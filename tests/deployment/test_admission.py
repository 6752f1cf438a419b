"""Who may join: over a real SuperLink and real SuperNodes, with real certificates and keys."""

from __future__ import annotations

import json
import shutil
import socket
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from fedcl.deploy.certificates import new_authority, new_device_key, new_server_certificate
from fedcl.deploy.check import check
from fedcl.deploy.layout import Fleet
from fedcl.deploy.processes import Processes, unreachable
from fedcl.deploy.submit import CONNECTION, flwr, register
from fedcl.rules import ConfigError

pytestmark = [pytest.mark.deployment, pytest.mark.timeout(600)]
Up = Callable[[Fleet], Processes]


def online(fleet: Fleet) -> int:
    answer = json.loads(flwr(fleet, "supernode", "list", CONNECTION, "--format", "json"))
    return sum(node.get("status") == "online" for node in answer["nodes"])


def wait_for_text(file: Path, text: str, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not (file.is_file() and text in file.read_text(errors="replace")):
        if time.monotonic() > deadline:
            pytest.fail(f"{text!r} never came in {file}:\n{file.read_text(errors='replace')[-2000:]}")
        time.sleep(0.3)


def wrong(folder: Path) -> list[str]:
    return [finding.text for finding in check(folder) if finding.wrong]


def test_only_devices_with_a_known_key_and_our_authority_join(make_fleet: Callable[..., Fleet], up: Up) -> None:
    fleet = make_fleet()
    stranger = fleet.device("1")
    (stranger / "key").unlink()
    new_device_key(stranger / "key", stranger / "unknown.pub")
    misled = fleet.device("2")
    new_authority(misled / "ca.key", misled / "ca.crt")
    processes = up(fleet)
    processes.start_server()
    register(fleet)
    for name in fleet.devices:
        processes.start_device(name)
    wait_for_text(processes.log("device-1"), "Connection attempt failed")
    wait_for_text(processes.log("device-2"), "Connection attempt failed")
    deadline = time.monotonic() + 90
    while online(fleet) < 1:
        assert time.monotonic() < deadline, "the device with a known key does not join"
    assert online(fleet) == 1
    said = "\n".join(wrong(fleet.folder))
    assert "device 1: server/keys/1.pub belongs to another key" in said
    assert "device 2: its ca.crt is not the server's" in said
    assert "device 0" not in said
    assert any(text.endswith(f"signed by another authority than {misled / 'ca.crt'}") for text in wrong(misled))
    assert wrong(fleet.device("0")) == []


@pytest.mark.slow
def test_an_expired_certificate_is_refused_and_named(
    make_fleet: Callable[..., Fleet], up: Up, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedcl.deploy.processes.START_SECONDS", 25.0)
    fleet = make_fleet(devices=1)
    for name in ("server.key", "server.crt"):
        (fleet.server / name).unlink()
    new_server_certificate(fleet.ca, fleet.server / "server.key", fleet.server / "server.crt", "127.0.0.1", days=-2)
    processes = up(fleet)
    with pytest.raises(ConfigError, match="certificate has expired"):
        processes.start_server()  # it listens, and who connects as a device does turns away
    assert any("server.crt: expired on" in text for text in wrong(fleet.folder))
    processes.start_device("0")
    wait_for_text(processes.log("device-0"), "Connection attempt failed")
    assert any("is refused: certificate has expired" in text for text in wrong(fleet.device("0")))


def test_without_tls_nothing_starts_unless_it_was_typed(make_fleet: Callable[..., Fleet]) -> None:
    fleet = make_fleet(devices=1)
    script = (fleet.server / "start.sh").read_text() + (fleet.device("0") / "start.sh").read_text()
    assert "--insecure" not in script
    bare = make_fleet(devices=1, name="bare", insecure=True)
    assert "--insecure" in (bare.server / "start.sh").read_text()
    assert not list(bare.folder.rglob("*.key"))


def test_a_plain_port_is_no_server_of_ours(make_fleet: Callable[..., Fleet]) -> None:
    fleet = make_fleet(devices=1)
    with socket.create_server(("127.0.0.1", fleet.port)) as listening:
        listening.settimeout(10)
        why = unreachable(fleet, seconds=1.0)
    assert why is not None
    assert "cannot be reached" in why or "does not speak TLS" in why


def test_what_is_missing_is_named(make_fleet: Callable[..., Fleet]) -> None:
    fleet = make_fleet(devices=2)
    (fleet.server / "server.key").chmod(0o644)
    (fleet.device("0") / "client.yaml").write_text('client: "0"\ndata: [data=npz, data.root=/nowhere.npz]\n')
    shutil.rmtree(fleet.device("1"))
    findings = check(fleet.folder)
    said = "\n".join(finding.text for finding in findings if finding.wrong)
    assert "others can read this secret" in said
    assert "data.root=/nowhere.npz: does not exist" in said
    assert any("device 1: its folder has been moved" in finding.text for finding in findings if not finding.wrong)
