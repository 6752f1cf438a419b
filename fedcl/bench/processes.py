"""Processor time of a process and all that it has started, read from ``/proc`` (Linux)."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Collection, Mapping
from pathlib import Path

_PPID, _TIMES = 1, slice(11, 15)  # fields behind the name: parent; utime, stime and those of children waited for


def tree_seconds(root: int, without: Collection[int] = ()) -> float:
    """Return the processor seconds that ``root`` and its descendants have used, to a hundredth.

    ``without`` names processes that are left out with all their own. What a process used that has ended is counted with
    the one that waited for it.

    Raises
    ------
    OSError
        If the system has no ``/proc``.
    """
    found = _processes()
    return _ticks(root, found, _children(found), frozenset(without)) / os.sysconf("SC_CLK_TCK")


def descendants(root: int) -> set[int]:
    """Return the processes that ``root`` has started, and those that these have."""
    children = _children(_processes())
    reached, waiting = set(), [root]
    while waiting:
        new = [child for child in children[waiting.pop()] if child not in reached]
        reached.update(new)
        waiting.extend(new)
    return reached


def memory_kb(pids: Collection[int]) -> int:
    """Return the memory of processes together, in kB: what they share counts once (proportional set size)."""
    total = 0
    for pid in pids:
        try:
            rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue  # it has ended since
        total += sum(int(line.split()[1]) for line in rollup.splitlines() if line.startswith("Pss:"))
    return total


def _processes() -> dict[int, tuple[int, int]]:
    """Return every process's parent and the ticks it and its ended children have used."""
    found = {}
    for folder in os.listdir("/proc"):
        if not folder.isdigit():
            continue
        try:
            text = Path(f"/proc/{folder}/stat").read_text()
        except (FileNotFoundError, ProcessLookupError):
            continue  # it has ended since the listing
        fields = text.rpartition(")")[2].split()  # a process's name may hold blanks and brackets
        found[int(folder)] = (int(fields[_PPID]), sum(map(int, fields[_TIMES])))
    return found


def _children(found: Mapping[int, tuple[int, int]]) -> defaultdict[int, list[int]]:
    children: defaultdict[int, list[int]] = defaultdict(list)
    for pid, (parent, _) in found.items():
        children[parent].append(pid)
    return children


def _ticks(
    root: int, found: Mapping[int, tuple[int, int]], children: Mapping[int, list[int]], out: frozenset[int]
) -> int:
    ticks, waiting = 0, [root]
    while waiting:
        pid = waiting.pop()
        if pid in out:
            continue
        ticks += found.get(pid, (0, 0))[1]
        waiting.extend(children.get(pid, ()))
    return ticks
