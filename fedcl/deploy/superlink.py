"""The server's process: Flower's SuperLink on loopback, and a door for devices (:mod:`fedcl.deploy.gate`).

``python -m fedcl.deploy.superlink`` runs it in the folder ``server`` of a fleet. Flower's own command opens everything
that SuperLink can do at one address; here its command line's and its apps' routes answer on loopback alone.
"""

from __future__ import annotations

import argparse
import asyncio
import functools
import os
import ssl
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import HTTPException, Request
from flwr.app import Message
from flwr.common.constant import NOOP_ACCOUNT_NAME, NOOP_FLWR_AID
from flwr.server.superlink.linkstate import LinkState
from flwr.supercore.fab import Fab
from flwr.supercore.http_logging import get_uvicorn_log_config
from flwr.superlink.cli.flower_superlink import SuperLinkLifespan
from flwr.superlink.config_loader import SuperLinkLifespanConfig, load_control_authn_plugin
from flwr.superlink.dependencies.linkstate import get_linkstate
from flwr.superlink.main import create_app
from flwr.superlink.routers.fleet.router import router as fleet_routes
from starlette.middleware.trustedhost import TrustedHostMiddleware

from fedcl.deploy.bundle import signatures
from fedcl.deploy.gate import DeviceKeys, Gate, PatientProtocol
from fedcl.simulation.nodes import SERVER_FOLDER, bind_node, note_refusal, open_nodes

LOOPBACK = "127.0.0.1"
_JOINING = threading.Lock()
_NO_SELF_SERVICE = ("/v1/fleet/register-node", "/v1/fleet/unregister-node")


class FleetState:
    """SuperLink's state as the Fleet routes see it: it knows the keys of the list, and the signature of the bundle.

    ``asking`` is the node that makes the request, of whose key Flower has made sure.
    """

    def __init__(self, state: LinkState, keys: DeviceKeys | None, folder: Path, asking: int | None) -> None:
        self._state, self._keys, self._folder, self._asking = state, keys, folder, asking

    def __getattr__(self, name: str) -> Any:
        return getattr(self._state, name)

    def get_node_id_by_public_key(self, public_key: bytes) -> int | None:
        """Return the node of a key; one that is on the list becomes a node when it is first seen."""
        client = None if self._keys is None else self._keys.owner(public_key)
        if client is None:
            found: int | None = self._state.get_node_id_by_public_key(public_key)
            return found
        with _JOINING:
            node: int | None = self._state.get_node_id_by_public_key(public_key)
            if node is None:
                node = self._state.create_node(NOOP_FLWR_AID, NOOP_ACCOUNT_NAME, public_key, 0)
            bind_node(self._folder, node, client)
        return node

    def store_message_and_object_tree(self, message: Message, *rest: Any) -> Any:
        """Take in a reply, if it comes from the device that it says it comes from."""
        if message.metadata.src_node_id != self._asking:
            raise HTTPException(403, "a reply in another device's name")
        return self._state.store_message_and_object_tree(message, *rest)

    def get_fab(self, fab_hash: str) -> Fab | None:
        """Return a bundle, with the signature that ``fedcl deploy`` has given it."""
        fab = self._state.get_fab(fab_hash)
        return None if fab is None else Fab(fab.hash_str, fab.content, signatures(self._folder, fab_hash))


def main(arguments: Sequence[str] | None = None) -> None:
    """Serve until a signal comes."""
    parser = argparse.ArgumentParser(prog="python -m fedcl.deploy.superlink", description=__doc__)
    parser.add_argument("--host", required=True, help="address of this machine that devices connect to")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--control-port", type=int, required=True, help="on loopback, for fedcl deploy and its runs")
    parser.add_argument("--insecure", action="store_true", help="without TLS and authentication")
    args = parser.parse_args(arguments)
    folder = Path.cwd()
    os.environ[SERVER_FOLDER] = str(folder)
    for legacy in ("FLWR_INTERNAL_GRPC_CONTROL_API", "FLWR_INTERNAL_GRPC_FLEET_API"):
        os.environ.pop(legacy, None)  # would open further ports
    keys = None if args.insecure else DeviceKeys(folder / "keys")
    open_nodes(folder, bound=keys is not None)
    app = _application(args.control_port, keys, folder)
    paths = [route.path for route in fleet_routes.routes if hasattr(route, "path")]
    if keys is not None:
        paths = [path for path in paths if path not in _NO_SELF_SERVICE]
    gate = Gate(app, paths, keys, functools.partial(note_refusal, folder))
    log = get_uvicorn_log_config(_log_level())
    inner = uvicorn.Server(
        uvicorn.Config(app, host=LOOPBACK, port=args.control_port, log_config=log, proxy_headers=False, ws="none")
    )
    asyncio.run(_serve(inner, _for_devices(gate, args)))


def _for_devices(gate: Gate, args: argparse.Namespace) -> uvicorn.Server:
    """Return the server that devices connect to; exits if its certificate cannot be used."""
    certificate: dict[str, Any] = {} if args.insecure else {"ssl_certfile": "server.crt", "ssl_keyfile": "server.key"}
    config = uvicorn.Config(
        gate,
        host=args.host,
        port=args.port,
        log_config=get_uvicorn_log_config(_log_level()),
        lifespan="off",
        http=PatientProtocol,
        ws="none",
        proxy_headers=False,
        server_header=False,
        timeout_graceful_shutdown=1,
        **certificate,
    )
    try:
        config.load()
    except (OSError, ssl.SSLError) as error:
        sys.exit(f"server.crt, server.key: cannot be used: {error}")
    return uvicorn.Server(config)


def _log_level() -> int:
    from flwr.supercore.logger import console_handler

    return console_handler.level


def _application(control_port: int, keys: DeviceKeys | None, folder: Path) -> Any:
    config = SuperLinkLifespanConfig(
        control_address="",
        health_server_address=None,
        host=LOOPBACK,
        port=control_port,
        insecure=True,  # on loopback; devices come in by TLS
        certificates=None,
        superexec_auth_secret=None,
        authn_plugin=load_control_authn_plugin(),
        event_log_plugin=None,
        fleet_event_log_plugin=None,
        enable_event_log=False,
        artifact_provider=None,
        enable_supernode_auth=keys is not None,
        fleet_api_type="grpc-rere",
        fleet_api_address=None,
        simulation=False,
        ssl_ca_certfile=None,
        ssl_certfile=None,
        ssl_keyfile=None,
        database="state.db",
        isolation="subprocess",
        runtime_dependency_install=False,
    )
    app = create_app(config, SuperLinkLifespan)

    def fleet_state(request: Request) -> FleetState:
        asked = getattr(request.state, "protobuf_request", None)
        node = getattr(getattr(asked, "node", None), "node_id", None)
        return FleetState(get_linkstate(request), keys, folder, node)

    app.dependency_overrides[get_linkstate] = fleet_state
    # a web page in a browser on this machine may reach loopback too, by a name of its own
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=[LOOPBACK, "localhost"])
    return app


async def _serve(inner: uvicorn.Server, outer: uvicorn.Server) -> None:
    """Serve at both addresses; whichever ends takes the other with it."""

    async def until_it_ends(server: uvicorn.Server, other: uvicorn.Server) -> None:
        try:
            await server.serve()
        finally:
            other.should_exit = True

    # the door opens once what is behind it is there
    first = asyncio.create_task(until_it_ends(inner, outer))
    while not inner.started and not first.done():
        await asyncio.sleep(0.05)
    if not first.done():
        await asyncio.gather(first, until_it_ends(outer, inner))
    if not (inner.started and outer.started):
        sys.exit(1)


if __name__ == "__main__":
    main()
