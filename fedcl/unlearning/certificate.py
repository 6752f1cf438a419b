"""Certificates: what was to be forgotten, what was done, what is retained, and a chain that reveals later changes.

``certificates/0001-ID.json`` is written when a request has been processed. Its ``sha256`` is that of its canonical JSON
(keys sorted, no spaces, UTF-8) without this key, and ``previous`` is that of the certificate before it. Samples appear
as salted digests of their positions only; the salt is in ``certificates/salt``, which stays with the operator.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from torch import Tensor

from fedcl.base.files import sync_folder, write_atomic
from fedcl.contracts.requests import ErasureOutcome, ForgetRequest
from fedcl.contracts.strategy import Target
from fedcl.server.state import ServerData

FOLDER, SALT, FORMAT = "certificates", "salt", "fedcl-certificate-2"
_NAME = re.compile(r"(\d{4,})-([A-Za-z0-9._-]{1,64})\.json")
_HASH = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class About:
    """What is the same on all certificates that a process writes.

    ``unlearner`` is its node of the configuration with ``retrains``, ``options`` are those of ``unlearning.*``, ``run``
    identifies the run, ``versions`` are those of the packages that decide its bits. ``files`` says what becomes of the
    files that the run writes besides.
    """

    unlearner: Mapping[str, Any]
    options: Mapping[str, Any]
    run: Mapping[str, Any]
    versions: Mapping[str, str]
    files: Sequence[ErasureOutcome] = ()


@dataclass
class Receipt:
    """What processing some requests together did: all that a certificate says, except for the chain.

    ``first`` is the number of the first of them among all that were ever processed, from 1.
    """

    first: int
    requests: list[ForgetRequest]
    server_round: int
    promise: str
    before: str
    after: str
    model_epoch: int
    outcomes: list[ErasureOutcome]
    measurements: dict[str, float]
    cost: dict[str, float]


@dataclass(frozen=True)
class Certification:
    """Certifies processed requests, so that a kill at any moment leaves each of them processed once.

    Certificates come first, under names that are the same when they are written again; then ``save`` writes the
    checkpoint that knows the requests as processed; then ``purge`` removes what the run's folder still holds of the
    forget set. A run killed before the purge purges when it is resumed.
    """

    run_dir: Path
    about: About
    save: Callable[[ServerData], None]
    purge: Callable[[ServerData], None]

    def __call__(self, receipt: Receipt, server: ServerData) -> None:
        """Certify, save, purge."""
        for path, request in zip(write(self.run_dir, receipt, self.about), receipt.requests, strict=True):
            server.record.event(
                "request_certified",
                round=receipt.server_round,
                virtual_time=server.now,
                request=request.id,
                certificate=path.name,
                sha256=recorded(path),
            )
        self.save(server)
        self.purge(server)


def write(run_dir: Path, receipt: Receipt, about: About) -> list[Path]:
    """Write a certificate for each request of ``receipt`` and return their files.

    A run that was killed while it processed requests processes them again: the same files are replaced, and files that
    a run with another course has left in their place are removed.

    Raises
    ------
    OSError
        If a file cannot be written.
    """
    folder = run_dir / FOLDER
    folder.mkdir(exist_ok=True)
    written = []
    for index, request in enumerate(receipt.requests, start=receipt.first):
        content = {
            "format": FORMAT,
            "index": index,
            "request": _anonymous(request, folder),
            "processed_with": [other.id for other in receipt.requests if other.id != request.id],
            **{name: dict(getattr(about, name)) for name in ("unlearner", "options", "run", "versions")},
            "server_round": receipt.server_round,
            "model": {"before": receipt.before, "after": receipt.after, "epoch": receipt.model_epoch},
            "guarantee": receipt.promise,
            "erasure": [asdict(outcome) for outcome in (*receipt.outcomes, *about.files)],
            "measurements": dict(receipt.measurements),
            "cost": dict(receipt.cost),
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "previous": _previous(folder, index),
        }
        content = {name: _plain(value) for name, value in content.items()}
        path = folder / f"{index:04d}-{request.id}.json"
        text = json.dumps({**content, "sha256": digest(content)}, indent=2, ensure_ascii=False, allow_nan=False)
        write_atomic(path, text + "\n")
        _clear(folder, index, path.name)
        written.append(path)
    return written


def digest(content: Mapping[str, Any]) -> str:
    """Return the SHA-256 of a certificate's canonical JSON without its ``sha256``."""
    rest = {name: value for name, value in content.items() if name != "sha256"}
    text = json.dumps(rest, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def recorded(path: Path) -> str:
    """Return the hash that a certificate carries."""
    return str(json.loads(path.read_text())["sha256"])


def model_digest(models: Mapping[Target, Tensor]) -> str:
    """Return the SHA-256 of models, target by target: how a certificate identifies a state of the run."""
    digest = hashlib.sha256()
    for target in sorted(models):
        digest.update(target.encode() + b"\0" + models[target].contiguous().numpy().tobytes())
    return digest.hexdigest()


def sample_digest(salt: str, position: int) -> str:
    """Return what a certificate shows of a sample: whoever has the salt can tell whether it is a given position's."""
    return hashlib.sha256(f"{salt}:{position}".encode()).hexdigest()


def _anonymous(request: ForgetRequest, folder: Path) -> dict[str, Any]:
    content = asdict(request)
    if request.samples:
        salt = _salt(folder)
        content["samples"] = sorted(sample_digest(salt, position) for position in request.samples)
    return content


def _salt(folder: Path) -> str:
    """Return the run's salt, made when it is first needed, readable by its owner only."""
    path = folder / SALT
    if not path.is_file() or not _HASH.fullmatch(path.read_text().strip()):
        path.unlink(missing_ok=True)  # cut short by a kill: nothing depends on it yet
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w") as file:
            file.write(secrets.token_hex(32) + "\n")
            file.flush()
            os.fsync(file.fileno())
        sync_folder(folder)
    return path.read_text().strip()


def _previous(folder: Path, index: int) -> str:
    """Return the hash that the certificate before ``index`` carries, empty where there is none."""
    for at, _, path in files(folder):
        if at == index - 1:
            try:
                return recorded(path)
            except (ValueError, KeyError, TypeError):
                return ""  # damaged: `fedcl verify` says so
    return ""


def _clear(folder: Path, index: int, name: str) -> None:
    for at, _, path in files(folder):
        if at > index or (at == index and path.name != name):
            path.unlink()


def files(folder: Path) -> list[tuple[int, str, Path]]:
    """Return (index, request id, path) of the files that are named like certificates, in order."""
    found = []
    for path in folder.iterdir() if folder.is_dir() else ():
        match = _NAME.fullmatch(path.name)
        if match and path.is_file():
            found.append((int(match[1]), match[2], path))
    return sorted(found)


def _plain(value: Any) -> Any:
    """Return what canonical JSON can say: a number that is not finite as text."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {str(name): _plain(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    return value
