"""The server's process as its devices see it: over Flower's own state, without starting anything."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from fastapi import HTTPException
from flwr.app import Message, Metadata, RecordDict
from flwr.cli.build import build_fab_from_disk
from flwr.server.superlink.linkstate import LinkState
from flwr.supercore.constant import FLWR_IN_MEMORY_DB_NAME
from flwr.supercore.fab import Fab
from flwr.superlink.config_loader import get_federation_manager, get_objectstore_linkstate_factories
from flwr.supernode.start_client_internal import _verify_fab

from fedcl.deploy.bundle import KEY, sign, trusted
from fedcl.deploy.certificates import new_device_key, new_signing_key
from fedcl.deploy.gate import DeviceKeys
from fedcl.deploy.superlink import FleetState
from fedcl.simulation.compat import message_with
from fedcl.simulation.nodes import SERVER_FOLDER, open_nodes, owners


@pytest.fixture
def linkstate() -> LinkState:
    _, factory = get_objectstore_linkstate_factories(FLWR_IN_MEMORY_DB_NAME, get_federation_manager())
    return factory.state()


def pem(public: Path) -> bytes:
    form = serialization.PublicFormat.SubjectPublicKeyInfo
    key = serialization.load_ssh_public_key(public.read_bytes())
    return key.public_bytes(serialization.Encoding.PEM, form)


def test_each_key_of_the_list_is_a_node_bound_to_its_client(
    tmp_path: Path, linkstate: LinkState, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(SERVER_FOLDER, str(tmp_path))
    assert owners() is None  # a fleet without authentication binds nobody
    keys = tmp_path / "keys"
    keys.mkdir()
    for name in ("0", "1", "stranger"):
        new_device_key(tmp_path / name, keys / f"{name}.pub")
    (keys / "stranger.pub").rename(tmp_path / "stranger.pub")
    (keys / "broken.pub").write_text("no key")
    open_nodes(tmp_path, bound=True)
    owner = owners()
    assert owner is not None
    state = FleetState(linkstate, DeviceKeys(keys), tmp_path, None)
    first, second = (state.get_node_id_by_public_key(pem(keys / f"{name}.pub")) for name in ("0", "1"))
    assert first is not None
    assert second is not None
    assert state.get_node_id_by_public_key(pem(keys / "0.pub")) == first
    assert state.get_node_id_by_public_key(pem(tmp_path / "stranger.pub")) is None
    assert (owner(first), owner(second), owner(1)) == ("0", "1", None)
    new_device_key(tmp_path / "again", keys / "1.pub")  # its key was lost, or stolen
    later = FleetState(linkstate, DeviceKeys(keys), tmp_path, None).get_node_id_by_public_key(pem(keys / "1.pub"))
    assert later is not None
    assert (owner(second), owner(later)) == (None, "1")


def test_a_reply_in_another_devices_name_is_refused(tmp_path: Path, linkstate: LinkState) -> None:
    metadata = Metadata(
        run_id=1, message_id="m", src_node_id=6, dst_node_id=1, reply_to_message_id="a", group_id="",
        created_at=1.0, ttl=1.0, message_type="train",
    )  # fmt: skip
    reply: Message = message_with(metadata, RecordDict())
    with pytest.raises(HTTPException, match="another device's name"):
        FleetState(linkstate, None, tmp_path, 5).store_message_and_object_tree(reply, None, "s")


def test_the_signature_that_flowers_supernode_checks_is_on_fedcls_bundle_alone(
    tmp_path: Path, linkstate: LinkState
) -> None:
    from fedcl.deploy.init import write_app

    write_app(tmp_path / "app")
    public = new_signing_key(tmp_path / KEY)
    entities = dict([trusted(public).splitlines()[1].split(": ", 1)])
    sign(tmp_path, tmp_path / KEY)
    packed = build_fab_from_disk(tmp_path / "app")
    state = FleetState(linkstate, None, tmp_path, None)
    for content, accepted in ((packed, True), (b"another", False)):
        digest = hashlib.sha256(content).hexdigest()
        linkstate.store_fab(Fab(digest, content, {}))
        fab = state.get_fab(digest)
        assert fab is not None
        assert _verify_fab(fab, entities) is accepted
        assert ("valid_license" in fab.verifications) is accepted
    forged = Fab(fab.hash_str, b"another", state.get_fab(hashlib.sha256(packed).hexdigest()).verifications)  # type: ignore[union-attr]
    assert not _verify_fab(forged, entities)
    other = dict([trusted(new_signing_key(tmp_path / "other")).splitlines()[1].split(": ", 1)])
    assert not _verify_fab(Fab("", packed, forged.verifications), other)
