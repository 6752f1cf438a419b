"""Play the first run over several seeds: FOT against FedAvg on the built-in digits.

    python benchmarks/first_run/run.py --seeds 8

writes ``results.json`` and the table of ``README.md`` beside this file.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
KEYS = ("accuracy/average", "accuracy/average_incremental", "forgetting/first")
T_975 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}


def run_row(seed: int, folder: Path) -> dict[str, float]:
    """Return the summary of one seed's run and its reference."""
    command = [sys.executable, "-m", "fedcl", "run", "--quiet", "experiment=first_run", f"seed={seed}"]
    subprocess.run([*command, "backend=inline", "figures=false", f"run_dir={folder}"], check=True)
    summary: dict[str, float] = json.loads((folder / "summary.json").read_text())
    return {name: summary[name] for key in KEYS for name in (key, f"reference/{key}")}


def interval(values: list[float]) -> str:
    """Return mean and half-width of the 95 % interval (Student's t), in percent."""
    half = T_975[len(values)] * statistics.stdev(values) / math.sqrt(len(values))
    return f"{100 * statistics.mean(values):.1f} ± {100 * half:.1f}"


def main() -> None:
    """Run every seed and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=8, choices=range(2, 11))
    seeds = range(parser.parse_args().seeds)
    with tempfile.TemporaryDirectory() as folder:
        rows = [run_row(seed, Path(folder) / str(seed)) for seed in seeds]
    (HERE / "results.json").write_text(json.dumps(rows, indent=2) + "\n")
    table = ["| | average accuracy (%) | average incremental (%) | forgetting, first (%) |", "|---|---|---|---|"]
    for name, prefix in (("FOT", ""), ("FedAvg", "reference/")):
        cells = [interval([row[prefix + key] for row in rows]) for key in KEYS]
        table.append(f"| {name} | {' | '.join(cells)} |")
    gains = [row["reference/forgetting/first"] - row["forgetting/first"] for row in rows]
    text = f"""# The first run

`fedcl run` by itself: scikit-learn's digits, five tasks of two classes, task-incremental, ten clients (Dirichlet by
class, alpha 0.5), ten rounds a task, one local epoch, SGD 0.3, MLP 64-64; FOT (corrected, epsilon 0.9) against FedAvg
of the same seed. Mean and 95 % interval over {len(rows)} seeds:

{chr(10).join(table)}

FOT forgets less on {sum(gain > 0 for gain in gains)} of {len(rows)} seeds.

Command: `python benchmarks/first_run/run.py --seeds {len(rows)}`
"""
    (HERE / "README.md").write_text(text)


if __name__ == "__main__":
    main()
