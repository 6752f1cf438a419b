"""The parts of the page that tell what was run and what went on."""

from __future__ import annotations

import json
import shlex
from collections import Counter
from collections.abc import Mapping
from typing import Any

import yaml  # type: ignore[import-untyped, unused-ignore]

from fedcl.results.configurations import leaves
from fedcl.results.figures.timeline import FAULTS
from fedcl.results.html import elements as e
from fedcl.results.html.elements import Cell
from fedcl.results.report import event_counts
from fedcl.results.run import Run
from fedcl.unlearning.verification import Finding, read

_MAX_ROWS = 500
_PLACES = ("run_dir", "name", "trusted_packages")  # depend on where one stands, not on what was run
_COMMON = ("round", "virtual_time", "kind", "client")


def what_was_run(run: Run, defaults: Mapping[str, Any] | None) -> str:
    """Return the configuration, as a difference from the composition of nothing chosen."""
    content = []
    own = {key: value for key, value in leaves(run.config) if key.split(".")[0] not in _PLACES}
    if not own:
        content.append(e.paragraph("No configuration was recorded."))
    elif defaults is None:
        content.append(e.paragraph("What a run is by default is not known here; the whole configuration is below."))
    else:
        content.append(_differences(own, dict(leaves(defaults))))
    if run.reference is not None:
        content.append(e.paragraph(f"Compared with a run with the same seed: {run.config.get('compare_with', '')}"))
    if own:
        text = yaml.safe_dump(run.config, sort_keys=False, allow_unicode=True)
        content.append(e.details("The whole configuration", e.code(text, "configuration")))
    return e.section("what", "What was run", *content)


def _differences(own: Mapping[str, Any], defaults: Mapping[str, Any]) -> str:
    names = [*own, *(key for key in defaults if key not in own and key.split(".")[0] not in _PLACES)]
    empty = {key for key in names if defaults.get(key) == {} and any(other.startswith(f"{key}.") for other in own)}
    changed = [key for key in names if own.get(key) != defaults.get(key) and key not in empty]
    rows = [(key, _value(own, key), _value(defaults, key)) for key in changed]
    if not rows:
        return e.paragraph("Everything is as it is by default.")
    return e.table("Settings that are not the default", ("setting", "this run", "default"), rows)


def _value(settings: Mapping[str, Any], key: str) -> str:
    if key not in settings:
        return "\N{EN DASH}"
    value = settings[key]
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def events(run: Run) -> str:
    """Return faults and rejected replies, and how often other things happened."""
    faults = run.events[run.events["kind"].isin(FAULTS)]
    content = []
    if faults.empty:
        content.append(e.paragraph("No reply was lost or rejected, and no round skipped."))
    else:
        rows = []
        for _, event in faults.head(_MAX_ROWS).iterrows():
            fields = {key: value for key, value in event.items() if not _is_missing(value)}
            rest = "; ".join(f"{key}: {_plain(value)}" for key, value in fields.items() if key not in _COMMON)
            at = int(fields["round"])
            rows.append((str(fields["kind"]), Cell(str(at + 1), at), str(fields.get("client", "")), rest))
        content.append(e.table("Faults and rejected replies", ("what", "round", "client", "more"), rows))
        content += _cut(len(faults))
    others = {kind: count for kind, count in event_counts(run).items() if kind not in FAULTS and kind != "partition"}
    if others:
        content.append(e.paragraph("Also noted in events.jsonl: " + ", ".join(f"{k} {n}" for k, n in others.items())))
    return e.section("events", "Faults and rejected replies", *content)


def certificates(run: Run) -> str:
    """Return the certificates of what was forgotten, each checked against itself and the one before it."""
    findings = read(run.path)
    if not findings:
        return e.section("certificates", "Certificates", e.paragraph("No request to forget was processed."))
    parts = [
        e.paragraph(
            "Checked here against their own hashes and the chain of them; fedcl verify also checks them against the "
            "run and, where that was promised, retrains."
        ),
        *(_certificate(finding) for finding in findings[:_MAX_ROWS]),
        *_cut(len(findings)),
    ]
    return e.section("certificates", "Certificates", *parts)


def _certificate(finding: Finding) -> str:
    content = finding.content
    wrong = "".join(f'<p class="note">{e.esc(fault)}</p>' for fault in finding.faults)
    if not content:
        return f"<h3>{e.esc(finding.name)}</h3>\n{wrong}"
    request, unlearner = content["request"], content["unlearner"]
    named = {key: request[key] for key in ("clients", "classes", "tasks") if request.get(key)}
    if request.get("samples"):
        named["samples"] = f"{len(request['samples'])}, as digests"
    rows = [
        ("what", f"{request.get('scope')}: " + "; ".join(f"{key} {_plain(value)}" for key, value in named.items())),
        ("before round", int(content["server_round"]) + 1),
        ("by", str(unlearner.get("name", "")).rpartition(".")[2]),
        ("promises", content["guarantee"]),
        ("processed with", ", ".join(map(str, content["processed_with"])) or "no other"),
        ("cost", "; ".join(f"{key} {_plain(value)}" for key, value in content["cost"].items())),
        ("written", content["time"]),
        ("SHA-256", content["sha256"]),
    ]
    outcomes = [tuple(str(one.get(key, "")) for key in ("part", "outcome", "why")) for one in content["erasure"]]
    caption = f"What became of everything that remembers: {request.get('id')}"
    table = e.table(caption, ("part", "outcome", "why"), outcomes)
    return f"<h3>{e.esc(finding.name)}</h3>\n{wrong}{e.pairs(rows)}\n{e.details('What remains', table)}"


def environment(run: Run) -> str:
    """Return where and with what the run ran."""
    env = {key: value for key, value in run.env.items() if key not in ("launch", "packages", "threads", "git")}
    rows = [(str(key), _plain(value)) for key, value in env.items()]
    threads = (run.env.get("threads") or {}).items()
    rows += [(f"threads, {key}", "not set" if value is None else _plain(value)) for key, value in threads]
    git = run.env.get("git")
    rows.append(("commit", f"{git['sha']}{', changed' if git.get('dirty') else ''}" if git else "not a git checkout"))
    rows += [(str(key), str(value)) for key, value in (run.env.get("packages") or {}).items()]
    return e.section("environment", "Environment", e.pairs(rows) if run.env else e.paragraph("None was recorded."))


def repeat(run: Run) -> str:
    """Return the command that does the same run again, in a new folder."""
    launch = run.env.get("launch", {})
    chosen = [text for text in launch.get("overrides", run.overrides) if text.partition("=")[0] != "run_dir"]
    folders = [part for folder in launch.get("config_dirs", []) for part in ("--config-dir", folder)]
    command = shlex.join(["fedcl", "run", *folders, *chosen])
    sha = (run.env.get("git") or {}).get("sha")
    told = "It gives the same metrics.parquet, bit for bit, on the same kind of processor with the same PyTorch"
    told += f", from commit {sha}." if sha else "."
    if (run.env.get("git") or {}).get("dirty"):
        told += " The code had changes that were not committed."
    block = e.code(command, "command").replace("<pre", '<pre class="command"', 1)
    return e.section("repeat", "Do it again", block, e.paragraph(told))


def class_names(run: Run) -> dict[int, str]:
    """Return task -> its classes, as the run noted them when it began."""
    noted = run.events[run.events["kind"] == "partition"]
    tasks = noted["tasks"].iloc[0] if len(noted) and "tasks" in noted else []
    return {task: ", ".join(map(str, labels)) for task, labels in enumerate(tasks)} if isinstance(tasks, list) else {}


def faults_by_client(run: Run) -> Counter[str]:
    """Return how many faults there were with each client."""
    faults = run.events[run.events["kind"].isin(FAULTS)]
    return Counter(client for client in faults.get("client", []) if isinstance(client, str))


def _cut(count: int) -> list[str]:
    return [e.paragraph(f"These are the first {_MAX_ROWS} of {count}.")] if count > _MAX_ROWS else []


def _is_missing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and value != value)


def _plain(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list | tuple):
        return ", ".join(map(_plain, value))
    return "none" if value is None else str(value)
