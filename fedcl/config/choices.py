"""What can be chosen: config groups with their YAML files, and known names close to a mistyped one."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path

from hydra.core.override_parser.types import Override

from fedcl.config.value_rules import ConfigError, short


def groups_in(roots: Sequence[Path]) -> dict[str, dict[str, Path]]:
    """Return each config group with its choices and their files; the earlier root wins."""
    groups: dict[str, dict[str, Path]] = {}
    for root in roots:
        for path in sorted(root.rglob("*")):
            if path.is_dir():
                groups.setdefault(path.relative_to(root).as_posix(), {})
            elif path.suffix == ".yaml" and path.parent != root:
                groups.setdefault(path.parent.relative_to(root).as_posix(), {}).setdefault(path.stem, path)
    return groups


def description(file: Path) -> str:
    """Return the first comment line of a choice."""
    for line in file.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        if not line.startswith("# @package"):
            return line.lstrip("# ").strip()
    return ""


def choice(group: str, override: Override, options: Mapping[str, Path]) -> str:
    """Return ``group=name`` as Hydra reads it; ConfigError if there is no such choice."""
    value = override.value()
    names = value if isinstance(value, list) else [value]
    if value is None and group == "experiment":
        return f"{group}=null"
    twice = [str(name) for i, name in enumerate(names) if name in names[:i]]
    if twice:
        raise ConfigError(f"{group}=[{','.join(map(str, names))}]: names {twice[0]} twice; write it once")
    for name in names:
        if str(name) not in options:
            raise ConfigError(f"{group}={short(name)}: no such choice; available: {', '.join(sorted(options))}")
    return f"{group}=[{','.join(map(str, names))}]" if isinstance(value, list) else f"{group}={value}"


def suggest(key: str, known: Sequence[str]) -> str:
    """Return which of the known names a mistyped ``key`` may mean, as the end of a message."""

    def likeness(candidate: str) -> float:
        whole = difflib.SequenceMatcher(None, key, candidate).ratio()
        # Half-remembered settings are mostly remembered by their last word.
        last = difflib.SequenceMatcher(None, key.split(".")[-1], candidate.split(".")[-1]).ratio()
        return max(whole, 0.9 * last)

    scores = {name: likeness(name) for name in known}
    best = max(scores.values(), default=0.0)
    near = sorted(name for name, score in scores.items() if score >= max(0.6, best - 0.05))[:3]
    return f"; did you mean {' or '.join(near)}?" if near else ""
