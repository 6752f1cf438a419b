"""Reading a run's certificates: each checked by itself, as a link of the chain, and against the rest of the run."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedcl.unlearning.certificate import FOLDER, FORMAT, digest, files

_NAMES: dict[type, str] = {
    str: "format guarantee time previous sha256",
    int: "index server_round",
    list: "processed_with erasure",
    dict: "request unlearner options run versions model measurements cost",
}
_FIELDS = {name: kind for kind, names in _NAMES.items() for name in names.split()}


@dataclass
class Finding:
    """A file of the folder and everything that is wrong with it; ``content`` where it is a complete certificate."""

    name: str
    content: dict[str, Any] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)


def read(run_dir: Path) -> list[Finding]:
    """Return a run's certificates in order, each checked by itself and against the one before it."""
    findings: list[Finding] = []
    before, expected = "", 1
    for index, request_id, path in files(run_dir / FOLDER):
        for missing in range(expected, index):
            findings.append(Finding(f"{missing:04d}", faults=["is missing"]))
        finding = _check(path, index, request_id)
        if index < expected:
            finding.faults.append(f"there are two certificates with the number {index}")
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
        finding.faults.append(f"is not a certificate of format {FORMAT}: {', '.join(wrong) or 'format'}")
        return finding
    finding.content = content
    try:
        if digest(content) != content["sha256"]:
            finding.faults.append("sha256: the content was changed")
    except ValueError:  # a number that canonical JSON does not have
        finding.faults.append("sha256: the content was changed")
    if (content["index"], content["request"].get("id")) != (index, request_id):
        finding.faults.append("the name of the file has another number or request")
    return finding


def against_run(
    findings: list[Finding], processed: Sequence[str] | None, noted: Mapping[str, str], last: tuple[int, str] | None
) -> None:
    """Add to ``findings`` what is missing, and what contradicts the rest of the run's folder.

    Parameters
    ----------
    processed
        Ids of the requests that were processed according to the checkpoint, in order; None without a checkpoint.
    noted
        Hash by request id, as recorded in the events when the certificate was written.
    last
        (next round, hash of the models) of the checkpoint, if there is one.
    """
    by_id = {finding.content["request"].get("id"): finding for finding in findings if finding.content}
    for request_id in dict.fromkeys([*(processed or ()), *noted]):
        if request_id not in by_id:
            findings.append(Finding(request_id, faults=["its certificate is missing"]))
    for request_id, finding in by_id.items():
        if request_id not in noted:
            finding.faults.append("events.jsonl does not mention it")
        elif noted[request_id] != finding.content["sha256"]:
            finding.faults.append("events.jsonl recorded another hash when it was written")
        if processed is not None and request_id not in processed:
            finding.faults.append("the checkpoint does not know this request as processed")
    if processed and findings and last is not None:
        finding = by_id.get(processed[-1], Finding(""))
        if finding.content and finding.content["server_round"] == last[0] and _after(finding) != last[1]:
            finding.faults.append("model.after: the checkpoint holds other models, although no round followed")


def _after(finding: Finding) -> Any:
    return finding.content["model"].get("after")
