"""What tuning on the reported stream overstates: the two-phase protocol in both directions.

    FEDCL_DATA=<folder with mnist/> OMP_NUM_THREADS=1 python -m benchmarks.two_phase.run

Writes results.json and the tables of README.md beside this file; see there for the setting and the reading.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.every_learner import rewrite, spread
from fedcl.config.compose import compose
from fedcl.runs.two_phase import BEST, RESULT, two_phase

HERE = Path(__file__).resolve().parent
METRIC = "accuracy/average"
SEEDS = [0, 1, 2]
STREAMS = {
    "digits": ["data=digits"],
    "mnist": ["data=mnist", "data.source.train_limit=1250", "data.source.test_limit=1000"],
}
RATE = "client.optimizer.lr=0.03,0.1,0.3"


@dataclass(frozen=True)
class Method:
    """One line of the tables: what it chooses, and the values to search."""

    name: str
    overrides: tuple[str, ...]
    search: tuple[str, ...] = (RATE,)


METHODS = (
    Method("finetune", ("learner=finetune",)),
    Method("er", ("learner=er", "learner.er.budget=40")),
    Method("ranpac", ("learner=ranpac",), ("learner.ranpac.ridge=0.0001,0.01,1",)),
    Method("joint", ("scenario=joint", "scenario.num_tasks=1", "rounds_per_task=10")),
)


def overrides(method: Method, reported: str, folder: Path) -> list[str]:
    """Return the settings of the protocol that tunes on the other stream and reports on this one."""
    tuned = next(name for name in STREAMS if name != reported)
    lists = {"tune_on": STREAMS[tuned], "evaluate_on": STREAMS[reported], "search": list(method.search)}
    lists |= {"tune_seeds": SEEDS, "evaluate_seeds": SEEDS}
    plan = [f"protocol.{key}={json.dumps(value)}" for key, value in lists.items()]
    return [
        "experiment=two_phase",
        "protocol=two_phase",
        *method.overrides,
        *plan,
        f"run_dir={json.dumps(str(folder))}",
    ]


def run_row(method: Method, reported: str, work: Path) -> dict[str, Any]:
    """Play a protocol, or go on with it, and return what it found."""
    folder = work / f"{method.name}-{reported}"
    if not (folder / RESULT).is_file():
        settings = overrides(method, reported, folder)
        two_phase(compose(settings), settings, (), True)
        print(method.name, reported, (folder / BEST).read_text(encoding="utf-8").split(), flush=True)
    found: dict[str, Any] = json.loads((folder / RESULT).read_text(encoding="utf-8"))
    tuned = [{"settings": row["settings"], "values": row["values"]} for row in found["tuned"]]
    return {"tuned": tuned, "best": found["best"], "evaluated": found["evaluated"][METRIC]["values"]}


def held_out(candidates: Sequence[Mapping[str, Any]]) -> list[float]:
    """Return each seed's value with the candidate that is best on the other seeds of the same stream."""
    values = [row["values"] for row in candidates]
    chosen = []
    for seed in range(len(values[0])):
        others = [fmean(value for i, value in enumerate(row) if i != seed) for row in values]
        chosen.append(values[others.index(max(others))][seed])
    return chosen


def table(found: Mapping[str, Mapping[str, Any]], reported: str) -> str:
    """Return the table of one reported stream: the same one's best, best by other seeds, the other stream's best."""
    other = next(name for name in STREAMS if name != reported)
    head = ["", "settings tried", "tuned on it", "tuned on its other seeds", f"tuned on {other}", "overstated"]
    head += ["worst setting", "chosen on it", f"chosen on {other}"]
    lines = [f"### Reported: {reported}", "", "| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for name, both in found.items():
        if set(both) != set(STREAMS):
            continue
        here, there = both[other]["tuned"], both[reported]  # what is tuned on `reported` is reported on `other`
        best = max(here, key=lambda row: fmean(row["values"]))
        worst = min(here, key=lambda row: fmean(row["values"]))
        differences = [100 * (a - b) for a, b in zip(best["values"], there["evaluated"], strict=True)]
        cells = [str(len(here))]
        cells += [spread([100 * value for value in values])
                  for values in (best["values"], held_out(here), there["evaluated"])]  # fmt: skip
        cells += [spread(differences), spread([100 * value for value in worst["values"]])]
        cells += [_short(best["settings"]), _short(there["best"])]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _short(settings: Sequence[str]) -> str:
    pairs = [setting.split("=", 1) for setting in settings]
    return ", ".join(f"{key.rpartition('.')[2]} {value}" for key, value in pairs)


def main() -> None:
    """Play what is still to be played, write results.json and the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=[method.name for method in METHODS])
    parser.add_argument("--work", type=Path, default=Path("runs") / "two_phase", help="where runs are kept")
    args = parser.parse_args()
    file = HERE / "results.json"
    results: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    for method in METHODS:
        if not args.only or method.name in args.only:
            results[method.name] = {name: run_row(method, name, args.work.resolve()) for name in STREAMS}
    results = {method.name: results[method.name] for method in METHODS if method.name in results}
    file.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    body = "\n\n".join(table(results, name) for name in STREAMS)
    print(body)
    rewrite(HERE / "README.md", "tables", body)


if __name__ == "__main__":
    main()
