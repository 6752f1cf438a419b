"""The door before SuperLink: whom it lets through to an application, and what it says of the answers."""

from __future__ import annotations

import asyncio
import base64
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from fedcl.deploy.certificates import new_device_key
from fedcl.deploy.gate import DeviceKeys, Gate

PATH = "/v1/fleet/push-messages"


def headers_of(key: Path) -> list[tuple[bytes, bytes]]:
    private = serialization.load_ssh_private_key(key.read_bytes(), password=None)
    assert isinstance(private, ec.EllipticCurvePrivateKey)
    form = serialization.PublicFormat.SubjectPublicKeyInfo
    public = private.public_key().public_bytes(serialization.Encoding.PEM, form)
    signature = private.sign(b"now", ec.ECDSA(hashes.SHA256()))
    said = {b"flwr-public-key": base64.b64encode(public), b"flwr-signature": base64.b64encode(signature)}
    return [*said.items(), (b"flwr-timestamp", b"now"), (b"content-length", b"0"), (b"host", b"a/v1/runtime/x?")]


def asked(gate: Gate, headers: list[tuple[bytes, bytes]], path: str = PATH, **more: Any) -> int:
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        raise AssertionError("the body was read")

    scope = {"type": "http", "method": "POST", "path": path, "raw_path": path.encode(), "headers": headers}
    asyncio.run(gate({**scope, "query_string": b"a=b", **more}, receive, send))
    return int(sent[0].get("status", 0))


@pytest.mark.parametrize(
    ("status", "said"), [(200, []), (401, ["its clock"]), (403, ["the run is over"]), (500, ["log"])]
)
def test_a_reply_that_is_not_taken_is_told_by_client(tmp_path: Path, status: int, said: list[str]) -> None:
    (tmp_path / "keys").mkdir()
    new_device_key(tmp_path / "key", tmp_path / "keys" / "7.pub")
    new_device_key(tmp_path / "other", tmp_path / "other.pub")
    seen: list[Any] = []
    told: list[tuple[str, str]] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append(scope)
        await send({"type": "http.response.start", "status": status, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    def refused(client: str, why: str) -> None:
        told.append((client, why))

    gate = Gate(app, [PATH], DeviceKeys(tmp_path / "keys"), refused)
    assert asked(gate, headers_of(tmp_path / "key")) == status
    assert [client for client, _ in told] == ["7"] * len(said)
    assert all(text in why and str(status) in why for text, (_, why) in zip(said, told, strict=True))
    assert dict(seen[0]["headers"])[b"host"] == b"127.0.0.1"  # Flower judges a path by the host too
    assert seen[0]["query_string"] == b""
    assert asked(gate, headers_of(tmp_path / "other")) == 503
    forged = dict(headers_of(tmp_path / "key")) | {b"flwr-timestamp": b"later"}
    assert asked(gate, [*forged.items()]) == 401
    assert asked(gate, headers_of(tmp_path / "key"), path="/v1/fleet/x/../push-messages") == 404
    assert asked(gate, headers_of(tmp_path / "key"), raw_path=b"/v1/fleet/push%2dmessages") == 404
    assert asked(gate, [*headers_of(tmp_path / "key"), (b"host", b"b")]) == 400
    assert len(seen) == 1
    (tmp_path / "keys" / "7.pub").unlink()  # its device is shut out
    again = Gate(app, [PATH], DeviceKeys(tmp_path / "keys"), refused)
    assert asked(again, headers_of(tmp_path / "key")) == 503


def test_without_keys_the_routes_alone_decide() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})

    gate = Gate(app, [PATH], None)
    assert asked(gate, [(b"content-length", b"0")]) == 200
    assert asked(gate, [(b"content-length", b"0")], path="/v1/control/list-runs") == 404
    assert asked(gate, [], method="GET") == 405
    assert asked(gate, []) == 411
