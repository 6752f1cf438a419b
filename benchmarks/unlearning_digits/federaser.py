"""FedEraser on the digits: whether what is left is a backdoor, or a model that is wrong about everything.

    OMP_NUM_THREADS=1 python -m benchmarks.unlearning_digits.federaser

Two settings: this benchmark's, and one with momentum and a trigger in a block. In each the largest of ten clients
leaves after thirty rounds. It poisoned 80 % of its samples, or nothing (honest): then what the trigger does to the
model is nobody's doing. Writes federaser.json and the table in README.md.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from benchmarks.every_learner import rewrite, spread
from benchmarks.every_unlearner import AT, Bench, Numbers, case, centre_checks, compact, poison, requests
from fedcl.assembly import load_dataset
from fedcl.config.compose import compose
from fedcl.runs.setup import Setup

FOLDER = Path(__file__).parent


def centre_block(shape: tuple[int, ...]) -> np.ndarray:
    """Return the eight pixels in the middle of an 8x8 image: rows 3 and 4, columns 2 to 5."""
    chosen = np.zeros(shape, bool)
    chosen[..., 3:5, 2:6] = True
    return chosen


BENCH = Bench("unlearning_digits", FOLDER, label=3, mark=centre_checks(4), high=16)
REFERENCE = replace(BENCH, mark=centre_block)
MOMENTUM = ("client.optimizer.lr=0.05", "client.optimizer.momentum=0.9", "client.optimizer.weight_decay=0.0005")
SETTINGS: dict[str, tuple[Bench, tuple[str, ...]]] = {
    "lr 0.05, momentum 0.9, eight pixels in a block": (REFERENCE, MOMENTUM),
    "lr 0.2, eight pixels in checks": (BENCH, ()),
}
ROWS: dict[str, tuple[str, ...]] = {
    "retrain": ("unlearner=retrain",),
    "federaser": ("unlearner=federaser",),
    "federaser, two rounds more": ("unlearner=federaser", "unlearning.recovery_rounds=2"),
    "federaser, all rounds kept (`every=1`)": ("unlearner=federaser", "unlearner.every=1"),
}


def run_row(bench: Bench, overrides: tuple[str, ...], seed: int, *, honest: bool) -> Numbers:
    """Return clean accuracy and the trigger's success right after serving."""
    settings = ["experiment=unlearning_digits", f"seed={seed}", f"rounds_per_task={AT}", "unlearning.reference=false"]
    base = compose([*settings, *overrides, "unlearning.requests=[]"])
    setup = Setup.of(base, load_dataset(base))
    asked, departing_client = requests(bench, "client", setup, seed)
    if not honest:
        setup = poison(bench, setup, departing_client, seed)
    cfg = compose([*settings, *overrides, f"unlearning.requests={asked}"])
    with tempfile.TemporaryDirectory() as folder:  # for what retraining keeps
        found = case(bench, cfg, setup, None, Path(folder))
    return {name: found[f"now/{name}"] for name in ("clean", "backdoor")}


def table(results: dict[str, dict[str, dict[str, Numbers]]], marked: list[str]) -> str:
    """Return the Markdown table: means and intervals over all seeds, the first three's mean, and each seed's rate."""
    head = ["setting", "unlearner", "clean", "backdoor", f"backdoor, seeds {', '.join(marked)}", "largest"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for setting, rows in results.items():
        for name, runs in rows.items():
            clean, backdoor = ([100 * one[key] for one in runs.values()] for key in ("clean", "backdoor"))
            first = spread([100 * runs[seed]["backdoor"] for seed in marked], 1)
            cells = [setting, name, spread(clean, 1), spread(backdoor, 1), first, f"{max(backdoor):.1f}"]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Play all cases that are not in federaser.json yet, and write it and the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(7)))
    parser.add_argument("--again", action="store_true", help="play cases that are there already, too")
    args = parser.parse_args()
    torch.set_num_threads(1)
    file = FOLDER / "federaser.json"
    results = json.loads(file.read_text(encoding="utf-8")) if file.is_file() and not args.again else {}
    for setting, (bench, overrides) in SETTINGS.items():
        honest = {f"{name}, honest departing client": ROWS[name] for name in ("federaser",)}
        for name, own in {**ROWS, **honest}.items():
            runs = results.setdefault(setting, {}).setdefault(name, {})
            for seed in map(str, args.seeds):
                if seed not in runs:
                    is_honest = name.endswith("honest departing client")
                    runs[seed] = run_row(bench, (*overrides, *own), int(seed), honest=is_honest)
            print(setting, name, runs, flush=True)
            file.write_text(compact(results), encoding="utf-8")
    text = table(results, [str(seed) for seed in args.seeds[:3]])
    print(text)
    rewrite(FOLDER / "README.md", "federaser", text)


if __name__ == "__main__":
    main()
