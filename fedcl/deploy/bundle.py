"""The bundle that names fedcl's apps to Flower, and its signature: a device runs no other bundle.

``server/app`` is what Flower packs. ``ca/bundle.key`` signs the package, when a fleet is made and when its bytes change
with fedcl or Flower; otherwise nobody needs the key. Each device's ``trusted.yaml`` has the public half. Flower's own
SuperNode checks the signature before it unpacks anything.
"""

from __future__ import annotations

import base64
import hashlib
import json
import time
from pathlib import Path
from typing import Any

import yaml
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ed25519
from flwr.cli.build import build_fab_from_disk
from flwr.supercore.primitives.asymmetric_ed25519 import create_message_to_sign

from fedcl.base.files import write_atomic
from fedcl.config.value_rules import ConfigError

KEY, TRUSTED = "bundle.key", "trusted.yaml"
_SIGNED, _SIGNER = "bundle.json", "fedcl-deploy"


def sign(server: Path, key: Path) -> None:
    """Sign what Flower will pack of ``server/app``, unless it is signed already.

    Raises
    ------
    ConfigError
        If the key is needed, and is missing or is none.
    """
    digest = hashlib.sha256(build_fab_from_disk(server / "app")).digest()
    if digest.hex() in _signed(server):
        return
    now = int(time.time())
    signature = signing_key(key).sign(create_message_to_sign(digest, now))
    note = {"signature": base64.urlsafe_b64encode(signature).decode(), "signed_at": now}
    write_atomic(server / _SIGNED, json.dumps({digest.hex(): note}) + "\n")


def is_trusted(server: Path, file: Path) -> bool:
    """Whether a device with this ``trusted.yaml`` would run what Flower will pack of ``server/app``."""
    digest = hashlib.sha256(build_fab_from_disk(server / "app")).digest()
    try:
        note = _signed(server)[digest.hex()]
        entity = yaml.safe_load(file.read_text(encoding="utf-8"))[_SIGNER]
        key = serialization.load_ssh_public_key(entity.encode())
        signed = create_message_to_sign(digest, note["signed_at"])
        key.verify(base64.urlsafe_b64decode(note["signature"]), signed)  # type: ignore[call-arg]
    except (OSError, yaml.YAMLError, KeyError, TypeError, ValueError, AttributeError, InvalidSignature):
        return False
    return True


def _signed(server: Path) -> dict[str, dict[str, Any]]:
    file = server / _SIGNED
    found: dict[str, dict[str, Any]] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return found


def signing_key(file: Path) -> ed25519.Ed25519PrivateKey:
    """Return the key that signs bundles.

    Raises
    ------
    ConfigError
        If the file is missing or holds none.
    """
    try:
        key = serialization.load_ssh_private_key(file.read_bytes(), password=None)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file}: this bundle is not signed yet, and the key cannot be read: {error}") from error
    if not isinstance(key, ed25519.Ed25519PrivateKey):
        raise ConfigError(f"{file}: must be an Ed25519 key")
    return key


def signatures(server: Path, fab_hash: str) -> dict[str, str]:
    """Return what Flower sends along with a bundle for devices to check; nothing for one that was never signed."""
    signed = _signed(server)
    if fab_hash not in signed:
        return {}
    return {"valid_license": "Valid", _SIGNER: json.dumps(signed[fab_hash])}


def trusted(public: ed25519.Ed25519PublicKey) -> str:
    """Return a device's ``trusted.yaml``: whose bundles Flower's SuperNode accepts."""
    text = public.public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH).decode()
    return f"# Flower's SuperNode runs a bundle only if the owner of this key has signed it.\n{_SIGNER}: {text}\n"
