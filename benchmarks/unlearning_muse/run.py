"""MUSE's six properties of an unlearner, for image classification, on the digits.

    OMP_NUM_THREADS=1 python -m benchmarks.unlearning_muse.run

See README.md for what each property is here, the setting and the reading.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.every_learner import rewrite, spread
from benchmarks.every_unlearner import AT, SEQUENCE, Bench, Numbers, case, centre_checks, compact, trained
from fedcl.assembly import load_dataset, make_model
from fedcl.config.compose import compose
from fedcl.evaluation.predictions import hits, predict
from fedcl.models.flat import FlatModel
from fedcl.runs.setup import Setup

HERE = Path(__file__).parent
BENCH = Bench("unlearning_digits", HERE, label=3, mark=centre_checks(4), high=16)
UNLEARNERS = ("retrain", "continue_without", "ssd", "lfssd", "random_label", "neggrad_plus")
SIZES = (1, 2, 3, 4)  # classes of one request: 10 to 40 % of all samples
SEQUENTIAL = "sequence"
Results = dict[str, dict[str, dict[str, Numbers]]]  # sweep -> unlearner -> seed -> numbers


@dataclass
class ByClass:
    """Accuracy on the test samples of each class, and of the client that fares worst on the classes left."""

    model: FlatModel
    setup: Setup

    @cached_property
    def _test(self) -> tuple[Tensor, Tensor]:
        half = self.setup.dataset.test
        return torch.from_numpy(self.setup.dataset.normalise(half.x)), torch.from_numpy(half.y)

    def __call__(self, vector: Tensor) -> Numbers:
        """Return rates in [0, 1]: ``class/C``, and ``worst/K`` without the first K classes of the sequence."""
        x, y = self._test
        right = hits(predict(self.model, vector, x).logits, y).numpy()
        found = {f"class/{label}": float(right[y.numpy() == label].mean()) for label in range(10)}
        for count in range(len(SEQUENCE) + 1):
            left = ~np.isin(y.numpy(), SEQUENCE[:count])
            own = [part[left[part]] for part in self.setup.partition.test]
            found[f"worst/{count}"] = min(float(right[part].mean()) for part in own if len(part))
        return found


def asked(sweep: str) -> str:
    """Return ``unlearning.requests`` of a sweep: so many classes at once, or one after another."""
    if sweep == SEQUENTIAL:
        rows = [f"{{id: c{c}, scope: class, classes: [{c}], at: {{round: {AT + i}}}}}" for i, c in enumerate(SEQUENCE)]
        return f"[{', '.join(rows)}]"
    return f"[{{id: some, scope: class, classes: {list(SEQUENCE[: int(sweep)])}, at: {{round: {AT}}}}}]"


def measure(seeds: Sequence[int], work: Path) -> Results:
    """Play what is not kept under ``work`` yet, and return everything."""
    found: Results = {}
    for seed in seeds:
        settings = [f"experiment={BENCH.name}", f"seed={seed}", f"rounds_per_task={AT + len(SEQUENCE)}"]
        base = compose([*settings, "unlearning.requests=[]"])
        setup = Setup.of(base, load_dataset(base))
        look = ByClass(make_model(base, setup.dataset, setup.stream, torch.device("cpu")), setup)
        start: Any = None
        for sweep in [*map(str, SIZES), SEQUENTIAL]:
            for name in UNLEARNERS:
                file = work / sweep / f"{name}-{seed}.json"
                if not file.is_file():
                    start = trained(base, setup, work) if start is None else start
                    more = [f"unlearner={name}", f"unlearning.requests={asked(sweep)}"]
                    cfg = compose([*settings, *more, f"unlearning.cache={work / 'references' / f'{sweep}-{seed}'}"])
                    numbers = case(BENCH, cfg, setup, start, work, look)
                    file.parent.mkdir(parents=True, exist_ok=True)
                    file.write_text(json.dumps(numbers) + "\n", encoding="utf-8")
                    print(sweep, name, seed, flush=True)
                found.setdefault(sweep, {}).setdefault(name, {})[str(seed)] = json.loads(file.read_text())
    return found


# -- tables -----------------------------------------------------------------------------------------------------------


def over(numbers: Numbers, prefix: str, classes: Sequence[int]) -> float:
    """Return the mean accuracy over ``classes``, in percent."""
    return 100 * mean(numbers[f"{prefix}class/{label}"] for label in classes)


def properties(found: Results) -> str:
    """Return the table of the first four properties, after one class is forgotten."""
    columns: list[tuple[str, Callable[[Numbers], float]]] = [
        ("C1 forget train", lambda one: 100 * one["forget_train_accuracy"]),
        ("C2 forget test", lambda one: 100 * one["forget_test_accuracy"]),
        ("C2 linear probe", lambda one: 100 * one["linear_probe"]),
        ("C3 PrivLeak", lambda one: 100 * one["priv_leak"]),
        ("C4 retain test", lambda one: 100 * one["retain_test_accuracy"]),
        ("C4 worst client", lambda one: 100 * one["now/worst/1"]),
    ]
    rows = [
        [name, *(spread([of(one) for one in found["1"][name].values()], 1) for _, of in columns)] for name in UNLEARNERS
    ]
    return _table(["unlearner", *(title for title, _ in columns)], rows)


def scalability(found: Results) -> str:
    """Return the table of requests by size: accuracy on what was forgotten / on what is left."""
    rows = []
    for name in UNLEARNERS:
        cells = []
        for size in SIZES:
            runs = found[str(size)][name].values()
            gone, left = SEQUENCE[:size], [label for label in range(10) if label not in SEQUENCE[:size]]
            pair = [mean(over(one, "now/", classes) for one in runs) for classes in (gone, left)]
            cells.append(f"{pair[0]:.1f} / {pair[1]:.1f}")
        rows.append([name, *cells])
    return _table(["unlearner", *(f"C5 {10 * size} %" for size in SIZES)], rows)


def sustainability(found: Results) -> str:
    """Return the table of requests one after another: accuracy on all forgotten so far / on what is left."""
    rows = []
    for name, runs in found[SEQUENTIAL].items():
        cells = []
        for place in range(1, len(SEQUENCE) + 1):
            gone, left = SEQUENCE[:place], [label for label in range(10) if label not in SEQUENCE[:place]]
            now = f"{place}/now/"
            pair = [mean(over(one, now, classes) for one in runs.values()) for classes in (gone, left)]
            cells.append(f"{pair[0]:.1f} / {pair[1]:.1f}")
        rows.append([name, *cells])
    return _table(["unlearner", *(f"C6 request {place}" for place in range(1, len(SEQUENCE) + 1))], rows)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def main() -> None:
    """Read the command line, play, and write results.json and the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--work", type=Path, default=Path("runs") / "unlearning_muse", help="where cases are kept")
    parser.add_argument("--dry", action="store_true", help="print the tables and leave the files as they are")
    args = parser.parse_args()
    torch.set_num_threads(1)
    found = measure(args.seeds, args.work)
    for name, table in (("properties", properties), ("size", scalability), ("sequence", sustainability)):
        text = table(found)
        print(f"\n{name}\n{text}")
        if not args.dry:
            rewrite(HERE / "README.md", name, text)
    if not args.dry:
        (HERE / "results.json").write_text(compact(found), encoding="utf-8")


if __name__ == "__main__":
    main()
