"""Certificates: what was asked to be forgotten, what was done, what remains, and a chain that shows changes later.

``certificates/0001-ID.json`` is written when a request has been served. Its ``sha256`` is that of its canonical JSON
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
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedcl.base.files import sync_folder, write_atomic
from fedcl.contracts.requests import ErasureOutcome, ForgetRequest

if TYPE_CHECKING:
    from fedcl.unlearning.receipt import Receipt

FOLDER, SALT, FORMAT = "certificates", "salt", "fedcl-certificate-1"
_NAME = re.compile(r"(\d{4,})-([A-Za-z0-9._-]{1,64})\.json")
_HASH = re.compile(r"[0-9a-f]{64}")
_FIELDS = {
    "format": str,
    "index": int,
    "request": dict,
    "served_with": list,
    "unlearner": dict,
    "options": dict,
    "run": dict,
    "versions": dict,
    "server_round": int,
    "model": dict,
    "guarantee": str,
    "residuals": list,
    "measurements": dict,
    "cost": dict,
    "time": str,
    "previous": str,
    "sha256": str,
}


@dataclass(frozen=True)
class About:
    """What is the same on all certificates that a process writes.

    ``unlearner`` is its node of the configuration with ``replays``, ``options`` how requests are served, ``run`` which
    run it is, ``versions`` the packages that decide its bits.
    """

    unlearner: Mapping[str, Any]
    options: Mapping[str, Any]
    run: Mapping[str, Any]
    versions: Mapping[str, str]


def write(run_dir: Path, receipt: Receipt, about: About, outcomes: Iterable[ErasureOutcome] = ()) -> list[Path]:
    """Write a certificate for each request of ``receipt`` and return their files.

    A run that was killed in serving them serves them again: the same files are replaced, and what a run that went
    another way has left in their place is removed. ``outcomes`` come behind the receipt's own.

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
            "request": _asked(request, folder),
            "served_with": [other.id for other in receipt.requests if other.id != request.id],
            **{name: dict(getattr(about, name)) for name in ("unlearner", "options", "run", "versions")},
            "server_round": receipt.server_round,
            "model": {"before": receipt.before, "after": receipt.after, "epoch": receipt.model_epoch},
            "guarantee": receipt.promise,
            "residuals": [asdict(residual) for residual in (*receipt.outcomes, *outcomes)],
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


def sample_digest(salt: str, position: int) -> str:
    """Return what a certificate shows of a sample: whoever has the salt can tell whether it is a given position's."""
    return hashlib.sha256(f"{salt}:{position}".encode()).hexdigest()


def _asked(request: ForgetRequest, folder: Path) -> dict[str, Any]:
    asked = asdict(request)
    if request.samples:
        salt = _salt(folder)
        asked["samples"] = sorted(sample_digest(salt, position) for position in request.samples)
    return asked


def _salt(folder: Path) -> str:
    """Return the run's salt, made when it is first needed, for its owner's eyes only."""
    path = folder / SALT
    if not path.is_file() or not _HASH.fullmatch(path.read_text().strip()):
        path.unlink(missing_ok=True)  # cut short by a kill: nothing rests on it yet
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w") as file:
            file.write(secrets.token_hex(32) + "\n")
            file.flush()
            os.fsync(file.fileno())
        sync_folder(folder)
    return path.read_text().strip()


def _previous(folder: Path, index: int) -> str:
    """Return the hash that the certificate before ``index`` carries, empty where there is none."""
    for at, _, path in _files(folder):
        if at == index - 1:
            try:
                return recorded(path)
            except (ValueError, KeyError, TypeError):
                return ""  # damaged: `fedcl verify` says so
    return ""


def _clear(folder: Path, index: int, name: str) -> None:
    for at, _, path in _files(folder):
        if at > index or (at == index and path.name != name):
            path.unlink()


def _files(folder: Path) -> list[tuple[int, str, Path]]:
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


@dataclass
class Finding:
    """A certificate as it lies in the folder, and everything that is wrong with it; ``content`` where it is whole."""

    name: str
    content: dict[str, Any] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)


def read(run_dir: Path) -> list[Finding]:
    """Return a run's certificates in order, each checked by itself and against the one before it."""
    findings: list[Finding] = []
    before, expected = "", 1
    for index, request_id, path in _files(run_dir / FOLDER):
        for missing in range(expected, index):
            findings.append(Finding(f"{missing:04d}", faults=["is missing"]))
        finding = _check(path, index, request_id)
        if index < expected:
            finding.faults.append(f"there are two with the number {index}")
        if finding.content and finding.content["previous"] != before:
            finding.faults.append("previous: is not the certificate before it")
        findings.append(finding)
        before, expected = str(finding.content.get("sha256", "")), max(expected, index + 1)
    return findings


def _check(path: Path, index: int, request_id: str) -> Finding:
    finding = Finding(path.name)
    try:
        content = json.loads(path.read_bytes())
        kinds = {name: type(value) for name, value in content.items()}
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        finding.faults.append(f"cannot be read: {error}")
        return finding
    wrong = sorted(name for name in kinds.keys() | _FIELDS.keys() if kinds.get(name) is not _FIELDS.get(name))
    if wrong or content["format"] != FORMAT:
        finding.faults.append(f"is no certificate of format {FORMAT}: {', '.join(wrong) or 'format'}")
        return finding
    finding.content = content
    try:
        if digest(content) != content["sha256"]:
            finding.faults.append("sha256: its content was changed")
    except ValueError:  # a number that canonical JSON does not have
        finding.faults.append("sha256: its content was changed")
    if (content["index"], content["request"].get("id")) != (index, request_id):
        finding.faults.append("its file bears another number or request")
    return finding


def against_run(
    findings: list[Finding], served: Sequence[str] | None, noted: Mapping[str, str], last: tuple[int, str] | None
) -> None:
    """Add to ``findings`` what is missing, and what contradicts the rest of the run's folder.

    Parameters
    ----------
    served
        Ids of the requests that the checkpoint says were served, in order; None without a checkpoint.
    noted
        Hash by request id, as the events noted them when they were written.
    last
        (round that would be played next, hash of the models) in the checkpoint, if there is one.
    """
    by_id = {finding.content["request"].get("id"): finding for finding in findings if finding.content}
    for request_id in dict.fromkeys([*(served or ()), *noted]):
        if request_id not in by_id:
            findings.append(Finding(request_id, faults=["its certificate is missing"]))
    for request_id, finding in by_id.items():
        if request_id not in noted:
            finding.faults.append("events.jsonl does not know of it")
        elif noted[request_id] != finding.content["sha256"]:
            finding.faults.append("events.jsonl noted another one when it was written")
        if served is not None and request_id not in served:
            finding.faults.append("the checkpoint has not served this request")
    if served is not None and findings and last is not None and served:
        finding = by_id.get(served[-1], Finding(""))
        if finding.content and finding.content["server_round"] == last[0] and _after(finding) != last[1]:
            finding.faults.append("model.after: the checkpoint holds other models, and no round followed")


def _after(finding: Finding) -> Any:
    return finding.content["model"].get("after")
