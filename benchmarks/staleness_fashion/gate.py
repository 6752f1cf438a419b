"""Where should the gate of gradient inversion be? Chosen on all seeds but one, judged on that one.

    python benchmarks/staleness_fashion/gate.py

Reads estimation.json: every search there, good or cut short, is a case with a residual (which a server knows) and an
error (which it does not). A gate takes the inversion up to a residual and the late change beyond.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
GATES = [0.0, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, float("inf")]
Case = tuple[int, float, float, float]  # seed, residual, error of the inversion, error of the late change


def cases(rows: Sequence[dict[str, Any]]) -> list[Case]:
    """Return every inversion with the late change it is to replace."""
    keys = ("network", "seed", "class", "age")
    late = {tuple(row[key] for key in keys): row for row in rows if row["corrector"] == "late change"}
    return [
        (row["seed"], row["residual"], row["cosine_distance"], late[tuple(row[key] for key in keys)]["cosine_distance"])
        for row in rows
        if row["residual"] is not None
    ]


def error(chosen: Sequence[Case], gate: float) -> float:
    """Return the mean cosine distance of what enters with ``gate``."""
    return float(np.mean([told if residual <= gate else late for _, residual, told, late in chosen]))


def main() -> None:
    """Print the errors by residual, the gates by held-out seed, and every gate's mean error."""
    all_cases = cases(json.loads((HERE / "estimation.json").read_text()))
    print("| residual | cases | inversion | late change | inversion is nearer |\n|---|---|---|---|---|")
    for low, high in pairwise(GATES):
        within = [(told, late) for _, residual, told, late in all_cases if low < residual <= high]
        if within:
            told, late = np.array(within).T
            print(f"| {low:g} to {high:g} | {len(within)} | {np.median(told):.3f} | {np.median(late):.3f} | "
                  f"{np.mean(told < late):.0%} |")  # fmt: skip
    print("\n| held out | gate chosen | error held out | always | never |\n|---|---|---|---|---|")
    for seed in sorted({case[0] for case in all_cases}):
        others, mine = [c for c in all_cases if c[0] != seed], [c for c in all_cases if c[0] == seed]
        gate = min(GATES, key=lambda value: error(others, value))
        print(f"| seed {seed} | {gate:g} | {error(mine, gate):.4f} | {error(mine, GATES[-1]):.4f} | "
              f"{error(mine, GATES[0]):.4f} |")  # fmt: skip
    print("\ngate: error  " + "  ".join(f"{gate:g}: {error(all_cases, gate):.4f}" for gate in GATES))


if __name__ == "__main__":
    main()
