"""How much memory there is: what a header or a setting asks for is compared with it before it is taken."""

from __future__ import annotations

import os
import re
from contextlib import suppress
from pathlib import Path


def free_memory() -> int:
    """Return the bytes that this process can still take: what the machine has free, within its control group's limit.

    Pages of the disk cache count as free. Where the system tells nothing, a tenth of a terabyte.
    """
    free = 10**11
    with suppress(OSError, ValueError):  # other systems than Linux
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with suppress(OSError):
        found = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
        free = int(found[1]) << 10 if found else free
    for file in ("memory.max", "memory/memory.limit_in_bytes"):
        with suppress(OSError, ValueError):  # no control groups, or "max"
            free = min(free, int(Path("/sys/fs/cgroup", file).read_text()))
    return free


def gib(count: int) -> str:
    """Write a number of bytes for a message."""
    return f"{count / 2**30:.3g} GiB"
