"""Who may join: over a real SuperLink and real SuperNodes, with real certificates and keys."""

from __future__ import annotations

import base64
import datetime
import json
import re
import shutil
import socket
import ssl
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.common.constant import ErrorCode
from flwr.proto.fleet_pb2 import PullMessagesRequest
from flwr.proto.node_pb2 import Node
from safetensors.torch import save_file

from fedcl.assembly import make_model
from fedcl.config.compose import compose
from fedcl.config.value_rules import ConfigError
from fedcl.deploy.certificates import new_authority, new_device_key, new_server_certificate
from fedcl.deploy.check import check
from fedcl.deploy.layout import Fleet
from fedcl.deploy.processes import Processes, environment, unreachable
from fedcl.deploy.submit import CONNECTION, flwr, submit
from fedcl.results import load
from fedcl.runs.setup import Setup
from tests.deploy.fleets import ended, new_fleet

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


def signed(fleet: Fleet, key: Path, route: str, request: Any, host: str = "x") -> int:
    """Return the status with which the door answers a request that is signed with a device's key."""
    private = serialization.load_ssh_private_key(key.read_bytes(), password=None)
    assert isinstance(private, ec.EllipticCurvePrivateKey)
    form = serialization.PublicFormat.SubjectPublicKeyInfo
    public = private.public_key().public_bytes(serialization.Encoding.PEM, form)
    now = datetime.datetime.now(datetime.UTC).isoformat()
    signature = private.sign(now.encode(), ec.ECDSA(hashes.SHA256()))
    body = request.SerializeToString()
    headers = {"host": host, "content-type": "application/protobuf", "content-length": str(len(body))}
    headers |= {"flwr-public-key": base64.b64encode(public).decode(), "flwr-timestamp": now, "connection": "close"}
    headers |= {"flwr-signature": base64.b64encode(signature).decode()}
    head = [f"POST /v1/fleet/{route} HTTP/1.1", *(f"{name}: {value}" for name, value in headers.items())]
    (status,) = asked(fleet, head, body)
    return status


def nodes_of(fleet: Fleet) -> set[str]:
    answer = json.loads(flwr(fleet, "supernode", "list", CONNECTION, "--format", "json"))
    return {node["node-id"] for node in answer["nodes"]}


def wait_for(condition: Callable[[], bool], seconds: float = 200) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come to pass"
        time.sleep(0.3)


def wrong(folder: Path) -> list[str]:
    return [finding.text for finding in check(folder) if finding.wrong]


@pytest.fixture(scope="module")
def standing(
    tmp_path_factory: pytest.TempPathFactory, end_processes: Callable[[str], None]
) -> Iterator[tuple[Fleet, Processes]]:
    """A fleet of which device 0 is right, device 1 has a key of its own, and device 2 another authority."""
    folder = tmp_path_factory.mktemp("standing")
    fleet = new_fleet(folder / "fleet", 3)
    stranger = fleet.device("1")
    (stranger / "key").unlink()
    new_device_key(stranger / "key", stranger / "unknown.pub")
    misled = fleet.device("2")
    new_authority(misled / "ca.key", misled / "ca.crt")
    with ended(folder, end_processes) as up:
        processes = up(fleet)
        for name in fleet.devices:  # the order does not matter
            processes.start_device(name)
        processes.start_server()
        yield fleet, processes


def test_only_devices_with_a_known_key_and_our_authority_join(standing: tuple[Fleet, Processes]) -> None:
    fleet, processes = standing
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
    misled = fleet.device("2")
    assert any(text.endswith(f"signed by another authority than {misled / 'ca.crt'}") for text in wrong(misled))
    assert wrong(fleet.device("0")) == []


FOREIGN = {
    "pyproject.toml": """
[project]
name = "foreign"
version = "1.0.0"
description = "x"
license = "Apache-2.0"
[tool.flwr.app]
publisher = "stranger"
[tool.flwr.app.components]
serverapp = "foreign.server:app"
clientapp = "foreign.client:app"
[tool.flwr.app.config]
mark = ""
""",
    "foreign/__init__.py": "",
    "foreign/server.py": """
from pathlib import Path
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import ServerApp
app = ServerApp()
@app.main()
def main(grid, context):
    mark = Path(context.run_config["mark"])
    (mark / "server").write_text("ran")
    nodes = list(grid.get_node_ids())
    asked = [Message(RecordDict({"a": ConfigRecord({"x": 1})}), dst_node_id=n, message_type="query") for n in nodes]
    replies = list(grid.send_and_receive(asked, timeout=120))
    (mark / "replies").write_text(" ".join(str(r.error.code) if r.has_error() else "answered" for r in replies))
""",
    "foreign/client.py": """
from pathlib import Path
from flwr.app import Message
from flwr.clientapp import ClientApp
app = ClientApp()
@app.query()
def answer(message, context):
    (Path(context.run_config["mark"]) / "device").write_text("ran")
    return Message(message.content, reply_to=message)
""",
}


@pytest.fixture
def foreign(tmp_path: Path) -> tuple[Path, Path]:
    """An app that is not fedcl's, and the folder in which each half of it leaves a mark when it runs."""
    for name, text in FOREIGN.items():
        (tmp_path / "app" / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / "app" / name).write_text(text)
    (tmp_path / "marks").mkdir()
    return tmp_path / "app", tmp_path / "marks"


def flwr_as(home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    env = {**environment(), "FLWR_HOME": str(home), "FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}
    command = ["flwr", *arguments]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=240, check=False)


def test_a_stranger_with_the_address_and_the_authoritys_certificate_can_do_nothing(
    standing: tuple[Fleet, Processes], foreign: tuple[Path, Path], tmp_path: Path
) -> None:
    fleet, _ = standing
    app, marks = foreign
    home = tmp_path / "home"
    home.mkdir()
    connection = f'[superlink]\ndefault = "s"\n[superlink.s]\naddress = "{fleet.where}"\n'
    (home / "config.toml").write_text(connection + f'root-certificates = "{fleet.device("0") / "ca.crt"}"\n')
    new_device_key(tmp_path / "key", tmp_path / "key.pub")
    nodes = nodes_of(fleet)
    for arguments in (
        ["ls", "s"],
        ["supernode", "register", str(tmp_path / "key.pub"), "s"],
        ["run", str(app), "s", "--run-config", f"mark='{marks}'"],
    ):
        done = flwr_as(home, *arguments)
        assert done.returncode != 0, done.stdout
        assert "404 Not Found" in done.stdout + done.stderr
    assert nodes_of(fleet) == nodes
    assert json.loads(flwr(fleet, "ls", CONNECTION, "--format", "json"))["runs"] == []
    assert list(marks.iterdir()) == []


ROUTES = [
    (f"{method} {path} HTTP/1.1", status)
    for method, path, status in (
        ("POST", "/v1/control/list-runs", 404),
        ("POST", "/v1/control/start-run", 404),
        ("POST", "/v1/runtime/acquire-task", 404),
        ("GET", "/health", 404),
        ("GET", "/docs", 404),
        ("GET", "/openapi.json", 404),
        ("POST", "/v1/fleet/../control/list-runs", 404),
        ("POST", "/v1/fleet/%2e%2e/control/list-runs", 404),
        ("POST", "/v1/fleet/..%2fcontrol/list-runs", 404),
        ("POST", "/v1/fleet/..;/control/list-runs", 404),
        ("POST", "/v1/fleet//pull-messages", 404),
        ("POST", "//v1/fleet/pull-messages", 404),
        ("POST", "/v1/fleet%2fpull-messages", 404),
        ("POST", "/v1/fleet/pull%2dmessages", 404),
        ("POST", "/v1/fleet/pull-messages/", 404),
        ("POST", "/V1/fleet/pull-messages", 404),
        ("POST", "/v1/fleet/register-node", 404),
        ("POST", "/v1/fleet/unregister-node", 404),
        ("POST", "http://127.0.0.1/v1/control/list-runs", 404),
        ("POST", "/v1/fleet/get-fab", 401),
        ("POST", "/v1/fleet/pull-messages?x=/v1/control/list-runs", 401),
        ("GET", "/v1/fleet/pull-messages", 405),
        ("PUT", "/v1/fleet/pull-messages", 405),
    )
]
PLAIN = ["host: x", "content-length: 0"]
TRICKS = [
    (["host: x/v1/runtime/push-object?", "content-length: 0"], "push-object", 401),
    (["host: x", "content-length: 0", "x-forwarded-for: 127.0.0.1", "x-forwarded-proto: https"], "get-run", 401),
    (["host: x", "connection: upgrade", "upgrade: websocket", "content-length: 0"], "get-run", 401),
    (["host: x", "connection: upgrade, http2-settings", "upgrade: h2c", "content-length: 0"], "get-run", 401),
    (["host: x", "transfer-encoding: chunked"], "push-object", 411),
    (["host: x", f"content-length: {1 << 40}"], "push-object", 413),
    (["host: x", "content-length: 5", "transfer-encoding: chunked"], "push-object", 401),
    (["host: x", "flwr-public-key: !", "flwr-signature: !", "content-length: 0"], "get-run", 401),
    (
        ["host: x", "flwr-public-key: eA==", "flwr-signature: eA==", "flwr-timestamp: x", "content-length: 0"],
        "get-run",
        503,
    ),
    (["host: x", "flwr-timestamp: a", "flwr-timestamp: b", "content-length: 0"], "get-run", 400),
    (["host: x", f"a: {'a' * 200_000}"], "get-run", 400),
]


def opened(fleet: Fleet) -> ssl.SSLSocket:
    trusted = ssl.create_default_context(cafile=str(fleet.server / "ca.crt"))
    plain = socket.create_connection(("127.0.0.1", fleet.port), timeout=300)
    return trusted.wrap_socket(plain, server_hostname="127.0.0.1")


def asked(fleet: Fleet, head: list[str], body: bytes = b"") -> list[int]:
    """Return the statuses with which the door answers what is sent as it stands, until it closes."""
    answer = b""
    with opened(fleet) as line:
        with suppress(OSError):  # it may close before everything has been sent
            line.sendall("\r\n".join([*head, "", ""]).encode() + body)
        with suppress(OSError):
            while data := line.recv(65536):
                answer += data
    return [int(status) for status in re.findall(rb"HTTP/1\.1 (\d{3})", answer)]


def test_the_door_opens_for_no_other_spelling(standing: tuple[Fleet, Processes]) -> None:
    fleet, _ = standing
    slow = opened(fleet)
    slow.sendall(b"POST /v1/fleet/get-run HTTP/1.1\r\nhost: ")
    answers = {line: asked(fleet, [line, *PLAIN]) for line, _ in ROUTES}
    assert answers == {line: [status] for line, status in ROUTES}
    for headers, route, status in TRICKS:
        assert asked(fleet, [f"POST /v1/fleet/{route} HTTP/1.1", *headers]) == [status], headers
    second = "POST /v1/control/list-runs HTTP/1.1\r\nhost: x\r\ncontent-length: 0\r\n\r\n"
    assert asked(fleet, ["POST /v1/fleet/get-run HTTP/1.1", *PLAIN], second.encode()) == [401]
    node = Node(node_id=next(int(one) for one in nodes_of(fleet)))
    pull, own = PullMessagesRequest(node=node), fleet.device("0") / "key"
    assert signed(fleet, own, "pull-messages", pull) == 200
    assert signed(fleet, fleet.device("1") / "key", "pull-messages", pull) == 503  # on nobody's list
    assert signed(fleet, own, "pull-messages", PullMessagesRequest(node=Node(node_id=1 + node.node_id))) == 401
    assert signed(fleet, own, "pull-messages", pull, host="x/v1/runtime/pull-object?") == 200  # no host misleads it
    with slow:
        assert slow.recv(1) == b""  # whoever does not finish what it says is not waited for
    rows = [line.split() for file in ("tcp", "tcp6") for line in Path(f"/proc/net/{file}").read_text().splitlines()[1:]]
    listening = [row[1] for row in rows if row[3] == "0A" and row[1].endswith(f":{fleet.control_port:04X}")]
    assert listening == [f"0100007F:{fleet.control_port:04X}"]  # what answers everything does so on loopback alone


def test_who_is_on_the_servers_machine_runs_nothing_on_a_device(
    standing: tuple[Fleet, Processes], foreign: tuple[Path, Path], tmp_path: Path
) -> None:
    fleet, processes = standing
    app, marks = foreign
    wait_for(lambda: online(fleet) == 1)
    done = flwr_as(fleet.server / "flwr", "run", str(app), CONNECTION, "--run-config", f"mark='{marks}'", "--stream")
    assert (marks / "replies").is_file(), done.stdout + done.stderr
    assert (marks / "replies").read_text() == str(ErrorCode.INVALID_FAB)
    assert not (marks / "device").exists()
    assert "could not be verified" in processes.log("device-0").read_text(errors="replace")
    assert not [path for path in (fleet.device("0") / "flwr").rglob("*") if "foreign" in path.name]
    folder = fleet.folder / "runs" / "own"  # the same device, through the same door, for its own server
    few = ["num_clients=1", "scenario.num_tasks=1", "rounds_per_task=1", "learner=er", "strategy/projection=none"]
    weights = tmp_path / "weights.safetensors"  # a file of the server's, which no device hears of
    cfg = compose([*few, "backend=flower"])
    setup = Setup.of(cfg)
    network = make_model(cfg, setup.dataset, setup.stream, torch.device("cpu")).module
    save_file({name: 0.5 * tensor for name, tensor in network.state_dict().items()}, weights)
    submit(fleet, [*few, f"model.pretrained={weights}", "figures=false", f"run_dir={folder}"], quiet=True)
    assert load(folder).status == "done"
    assert f"pretrained: {weights}" in (folder / "config.yaml").read_text()
    notes = [file.read_text() for file in (fleet.device("0") / "state").rglob("*.notes/config.json")]
    assert [json.loads(text)["config"]["model"]["pretrained"] for text in notes] == [None]
    assert str(weights) not in "".join([*notes, (fleet.server / "run.toml").read_text()])
    assert str(folder) not in "".join([*notes, (fleet.server / "run.toml").read_text()])


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
    assert [file.name for file in bare.folder.rglob("*.key")] == ["bundle.key"]  # devices want a signature all the same


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
