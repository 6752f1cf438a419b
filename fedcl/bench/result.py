"""What a measurement comes to: rows for a table, and one number for the headline."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fedcl.results.environment import environment

Cell = str | int | float | bool
Row = Mapping[str, Cell]


@dataclass(frozen=True)
class Result:
    """A measurement's outcome.

    ``ratio`` is the headline, ``passed`` whether it is what the measurement promises; every row has the same keys, in
    the order in which they are shown. ``figures`` are the numbers that tables elsewhere quote, by name, ``notes``
    lines that belong below the table.
    """

    name: str
    ratio: float
    passed: bool
    rows: Sequence[Row]
    figures: Mapping[str, float] = field(default_factory=dict)
    notes: Sequence[str] = ()

    @classmethod
    def skipped(cls, name: str, why: str) -> Result:
        """Return the outcome of a measurement that cannot be made here: no rows, one line that says why."""
        return cls(name, 0.0, True, [], notes=(f"skipped: {why}",))

    def table(self) -> str:
        """Return the rows, of which there is at least one, as a Markdown table."""
        lines = [list(self.rows[0]), *([_show(cell) for cell in row.values()] for row in self.rows)]
        widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
        lines.insert(1, ["-" * width for width in widths])
        return "\n".join(
            "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |"
            for line in lines
        )

    def to_json(self, load_before: float | None = None) -> str:
        """Return the result with what it depends on: versions, processor, and how busy the machine was.

        ``load_before`` is the load average before anything was measured; the one after is asked for now.
        """
        env = environment(0, "cpu")
        machine = {key: env[key] for key in ("python", "platform", "cpu", "cpu_count", "git")}
        content: dict[str, Any] = {
            "bench": self.name,
            "ratio": self.ratio,
            "passed": self.passed,
            "rows": [dict(row) for row in self.rows],
            "figures": dict(self.figures),
            "notes": list(self.notes),
            "loadavg_before": load_before,
            "loadavg": list(os.getloadavg()),
            "versions": env["packages"],
            "machine": machine,
        }
        return json.dumps(content, indent=2) + "\n"


def _show(cell: Cell) -> str:
    if isinstance(cell, bool):
        return "yes" if cell else "NO"
    return f"{cell:.1f}" if isinstance(cell, float) else str(cell)
