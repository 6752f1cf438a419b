"""Let some of ten clients lie, in four ways, and see which aggregation rule holds up.

    PYTHONPATH=. python benchmarks/robust_digits/run.py --seeds 3

writes ``results.json`` and the tables of ``README.md`` beside this file; the attacks are those of
``tests/strategies/attacks.py``.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from pathlib import Path

from tests.strategies.attacks import ATTACKS, RULES, attacked

HERE = Path(__file__).resolve().parent
T_975 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}
LIARS = (1, 2, 3)  # of ten
LOST = 0.05  # accuracy below the unattacked mean's from which a cell is printed bold
Results = dict[str, list[float]]  # "rule attack liars" -> accuracy by seed
TITLES = {
    "sign_flip": "Sign flip: the own change, ten times and backwards",
    "alie": "ALIE: mean - 1.5 standard deviations of the honest changes",
    "ipm": "IPM: -1.1 times the mean of the honest changes",
    "label_flip": "Label flip: class y is called 9 - y in the liars' samples",
}


def measure(seeds: int) -> Results:
    """Return the accuracies of every case."""
    results: Results = {}
    for rule in RULES:
        cases: list[tuple[str | None, int]] = [(None, 0), *((attack, liars) for attack in ATTACKS for liars in LIARS)]
        for attack, liars in cases:
            values = [attacked(rule, attack, liars, seed=seed)[0] for seed in range(seeds)]
            results[f"{rule} {attack or 'none'} {liars}"] = values
            print(rule, attack, liars, values, flush=True)
    return results


def cell(values: list[float], whole: float) -> str:
    """Return mean and half-width of the 95 % interval (Student's t) in percent, bold where the round is lost."""
    mean = statistics.mean(values)
    half = T_975[len(values)] * statistics.stdev(values) / math.sqrt(len(values))
    text = f"{100 * mean:.1f} ± {100 * half:.1f}"
    return f"**{text}**" if mean < whole - LOST else text


def tables(results: Results) -> str:
    """Return a table for each attack."""
    whole = statistics.mean(results["fedavg none 0"])
    lines: list[str] = []
    for attack in ATTACKS:
        lines += [f"## {TITLES[attack]}", "", "| | nobody lies | 10 % | 20 % | 30 % |", "|---|---|---|---|---|"]
        for rule in RULES:
            keys = [f"{rule} none 0", *(f"{rule} {attack} {liars}" for liars in LIARS)]
            lines.append(f"| {rule} | {' | '.join(cell(results[key], whole) for key in keys)} |")
        lines.append("")
    return "\n".join(lines).rstrip()


def main() -> None:
    """Run every case, or write the tables of what was measured before, between the marks of ``README.md``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3, choices=range(2, 11))
    parser.add_argument("--tables", action="store_true", help="write the tables of results.json again")
    options = parser.parse_args()
    file, page = HERE / "results.json", HERE / "README.md"
    if not options.tables:
        file.write_text(json.dumps(measure(options.seeds), indent=1) + "\n")
    before, _, rest = page.read_text().partition("<!-- tables -->")
    after = rest.partition("<!-- end -->")[2]
    body = tables(json.loads(file.read_text()))
    page.write_text(f"{before}<!-- tables -->\n{body}\n<!-- end -->{after}")


if __name__ == "__main__":
    main()
