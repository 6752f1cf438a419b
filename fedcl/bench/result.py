"""What a measurement comes to: rows for a table, and one number for the headline."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedcl.results.environment import environment

Cell = str | int | float | bool
Row = Mapping[str, Cell]


@dataclass(frozen=True)
class Result:
    """A measurement's outcome.

    ``ratio`` is the headline, ``passed`` whether it is what the measurement promises; every row has the same keys, in
    the order in which they are shown.
    """

    name: str
    ratio: float
    passed: bool
    rows: Sequence[Row]

    def table(self) -> str:
        """Return the rows as a Markdown table."""
        lines = [list(self.rows[0]), *([_show(cell) for cell in row.values()] for row in self.rows)]
        widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
        lines.insert(1, ["-" * width for width in widths])
        return "\n".join(
            "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |"
            for line in lines
        )

    def to_json(self) -> str:
        """Return the result with what it depends on: versions, processor, and how busy the machine was."""
        env = environment(0, "cpu")
        machine = {key: env[key] for key in ("python", "platform", "cpu", "cpu_count", "git")}
        content: dict[str, Any] = {
            "bench": self.name,
            "ratio": self.ratio,
            "passed": self.passed,
            "rows": [dict(row) for row in self.rows],
            "loadavg": list(os.getloadavg()),
            "versions": env["packages"],
            "machine": machine,
        }
        return json.dumps(content, indent=2) + "\n"


def _show(cell: Cell) -> str:
    if isinstance(cell, bool):
        return "yes" if cell else "NO"
    return f"{cell:.1f}" if isinstance(cell, float) else str(cell)
