"""The server's gate for devices: Flower's Fleet routes and nothing else, only for the keys in ``server/keys``.

SuperLink serves the routes of devices, of the command line and of running apps as one application. The gate is in
front of it at the address that devices connect to. It decides by the head of a request, before it reads the body.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import logging
import time
from collections.abc import Awaitable, Callable, Collection, MutableMapping
from pathlib import Path
from typing import Any

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from flwr.supercore.primitives.asymmetric import bytes_to_public_key, verify_signature
from uvicorn.protocols.http.h11_impl import H11Protocol

MAX_BODY = 256 << 20  # bytes of one request; Flower sends a model's arrays in pieces of 5 MB
HEAD_SECONDS = 20.0  # a connection without a complete request by then is closed
_KEPT_HEADERS = (b"content-type", b"content-length", b"user-agent")
_PUBLIC_KEY, _SIGNATURE, _TIMESTAMP = b"flwr-public-key", b"flwr-signature", b"flwr-timestamp"
_WHY = {
    401: "the time that its device signed is not now: is its clock right, or a machine overloaded?",
    412: "Flower takes the device for connected still, and lets it in 60 s after its last heartbeat",
}
_log = logging.getLogger("uvicorn.error")  # the one that Flower's SuperLink shows

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Application = Callable[[Scope, Receive, Send], Awaitable[None]]


class DeviceKeys:
    """The list of keys: ``NAME.pub`` in ``folder`` is the key of the client NAME, in OpenSSH's format.

    The folder is read again once a second: a new file admits a device, a removed one shuts it out.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._owners: dict[bytes, str] = {}
        self._looked = -1.0

    def owner(self, public_key: bytes) -> str | None:
        """Return the client to whom a key in PEM belongs, or None."""
        if time.monotonic() - self._looked > 1.0:
            self._owners, self._looked = read_keys(self.folder), time.monotonic()
        return self._owners.get(public_key)


def read_keys(folder: Path) -> dict[bytes, str]:
    """Return the clients of the keys in ``folder`` by key, in PEM; a file that holds none is logged and left out."""
    owners: dict[bytes, str] = {}
    for file in sorted(folder.glob("*.pub")):
        try:
            key = serialization.load_ssh_public_key(file.read_bytes())
        except (OSError, ValueError, UnsupportedAlgorithm) as error:
            _log.warning("%s: no public key: %s", file, error)
            continue
        form = serialization.PublicFormat.SubjectPublicKeyInfo
        owners.setdefault(key.public_bytes(serialization.Encoding.PEM, form), file.stem)
    return owners


class Gate:
    """An ASGI application that lets a request through to ``app`` or answers it with a refusal.

    Parameters
    ----------
    app
        SuperLink's whole application.
    paths
        The routes that may be asked for, each exactly as written.
    keys
        Whose requests are let through; None: anybody's (a fleet without authentication).
    refused
        Takes a client whom Flower has not let in, or whose reply it has not taken, and why: nobody else would say so on
        this machine.
    """

    def __init__(
        self,
        app: Application,
        paths: Collection[str],
        keys: DeviceKeys | None,
        refused: Callable[[str, str], None] = lambda client, why: None,
    ) -> None:
        self._app, self._paths, self._keys, self._refused = app, frozenset(paths), keys, refused

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":  # no websocket is ever wanted
            await send({"type": "websocket.close", "code": 1008})
            return
        status, why = self._judge(scope)
        if status:
            await _refuse(send, status, why)
            return
        await self._app(_cleaned(scope), receive, self._watching(scope, send))

    def _watching(self, scope: Scope, send: Send) -> Send:
        """Return ``send``, with an eye on what becomes of a device's reply."""
        route, headers = scope["path"].rpartition("/")[2], dict(scope["headers"])
        if self._keys is None or not route.startswith(("push-", "activate-")):
            return send
        client = self._keys.owner(base64.b64decode(headers[_PUBLIC_KEY])) or ""

        async def watched(message: MutableMapping[str, Any]) -> None:
            status = message.get("status", 200)
            if status >= 400:
                why = "the run is over, or does not take it" if status == 403 else "see the server's log"
                self._refused(client, f"{status} at {route}: {_WHY.get(status, why)}")
            await send(message)

        return watched

    def _judge(self, scope: Scope) -> tuple[int, str]:
        """Return the status and the words of a refusal, or 0."""
        path = scope["path"]
        # as it was sent: neither percent signs nor a second spelling of a path reach the routes behind
        if path not in self._paths or scope["raw_path"] != path.encode():
            return 404, "there is nothing here but the routes of devices"
        if scope["method"] != "POST":
            return 405, "must be POST"
        names = [name for name, _ in scope["headers"]]
        if len(names) != len(set(names)):
            return 400, "a header was sent twice"
        headers = dict(scope["headers"])
        length = headers.get(b"content-length", b"")
        if not length.isdigit():
            return 411, "must say its length"
        if int(length) > MAX_BODY:
            return 413, f"must have at most {MAX_BODY} bytes"
        return self._recognise(headers) if self._keys is not None else (0, "")

    def _recognise(self, headers: dict[bytes, bytes]) -> tuple[int, str]:
        assert self._keys is not None  # asked by _judge
        try:
            public_key = base64.b64decode(headers[_PUBLIC_KEY], validate=True)
            signature = base64.b64decode(headers[_SIGNATURE], validate=True)
            timestamp = headers[_TIMESTAMP]
        except (KeyError, binascii.Error):
            return 401, "a device must sign its requests"
        if self._keys.owner(public_key) is None:
            return 503, "the device's key is not on the server's list"  # Flower's devices go on trying after a 503
        if not verify_signature(bytes_to_public_key(public_key), timestamp, signature):
            return 401, "the signature is not the device's"
        return 0, ""  # Flower itself looks whether the time that was signed is now, and at the node's number


def _cleaned(scope: Scope) -> Scope:
    """Return a request without what only a browser or a proxy would say: Flower judges paths by ``Host`` too."""
    kept = [(name, value) for name, value in scope["headers"] if name in _KEPT_HEADERS or name.startswith(b"flwr-")]
    return {**scope, "headers": [(b"host", b"127.0.0.1"), *kept], "query_string": b"", "root_path": ""}


async def _refuse(send: Send, status: int, why: str) -> None:
    body = why.encode() + b"\n"
    headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"connection", b"close")]
    headers.append((b"content-length", str(len(body)).encode()))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


class PatientProtocol(H11Protocol):
    """HTTP/1.1 on one connection, closed when no whole head of a request comes in time."""

    _waiting: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start to wait for the first request."""
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        """Take in some bytes, and wait on unless they complete a head."""
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        """Wait no longer."""
        super().connection_lost(exc)
        if self._waiting is not None:
            self._waiting.cancel()

    def _watch(self) -> None:
        in_request = self.cycle is not None and not self.cycle.response_complete
        if in_request and self._waiting is not None:
            self._waiting.cancel()
            self._waiting = None
        elif not in_request and self._waiting is None:
            self._waiting = self.loop.call_later(HEAD_SECONDS, self.transport.close)
