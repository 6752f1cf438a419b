"""The bundle that names fedcl's apps to Flower, and its signature: a device runs no other bundle.

``server/app`` is what Flower packs, ``server/bundle.key`` signs the package, and each device's ``trusted.yaml`` has the
public half. Flower's own SuperNode checks the signature before it unpacks anything.
"""

from __future__ import annotations

import base64
import hashlib
import json
import time
from pathlib import Path

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ed25519
from flwr.cli.build import build_fab_from_disk
from flwr.supercore.primitives.asymmetric_ed25519 import create_message_to_sign

from fedcl.files import write_atomic
from fedcl.rules import ConfigError

KEY, TRUSTED = "bundle.key", "trusted.yaml"
_SIGNED, _SIGNER = "bundle.json", "fedcl-deploy"


def sign(server: Path) -> bytes:
    """Sign what Flower will pack of ``server/app``, and return the package.

    Raises
    ------
    ConfigError
        If the key is missing or is none.
    """
    packed = build_fab_from_disk(server / "app")
    digest = hashlib.sha256(packed).digest()
    now = int(time.time())
    signature = _key(server / KEY).sign(create_message_to_sign(digest, now))
    note = {"signature": base64.urlsafe_b64encode(signature).decode(), "signed_at": now}
    write_atomic(server / _SIGNED, json.dumps({digest.hex(): note}) + "\n")
    return packed


def _key(file: Path) -> ed25519.Ed25519PrivateKey:
    try:
        key = serialization.load_ssh_private_key(file.read_bytes(), password=None)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file}: the key that signs for the devices cannot be read: {error}") from error
    if not isinstance(key, ed25519.Ed25519PrivateKey):
        raise ConfigError(f"{file}: must be an Ed25519 key")
    return key


def signatures(server: Path, fab_hash: str) -> dict[str, str]:
    """Return what Flower sends along with a bundle for devices to check; nothing for one that was never signed."""
    file = server / _SIGNED
    signed = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    if fab_hash not in signed:
        return {}
    return {"valid_license": "Valid", _SIGNER: json.dumps(signed[fab_hash])}


def trusted(public: ed25519.Ed25519PublicKey) -> str:
    """Return a device's ``trusted.yaml``: whose bundles Flower's SuperNode accepts."""
    text = public.public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH).decode()
    return f"# Flower's SuperNode runs a bundle only if the owner of this key has signed it.\n{_SIGNER}: {text}\n"
