"""Every unlearner that ``fedcl list unlearner`` knows, next to retraining: what the unlearning_* benchmarks share.

Thirty rounds, a request, ten rounds more, and what a model still knows at once, three and ten rounds later. Unlearners
that need nothing from the first rounds start from one and the same trained run. Finished cases are kept under --work.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.every_learner import rewrite, spread
from fedcl.assembly import load_dataset, make_model, make_unlearner
from fedcl.base.randomness import numpy_generator
from fedcl.base.tree import clone
from fedcl.config.compose import compose, list_choices
from fedcl.config.value_rules import ConfigError
from fedcl.data.dataset import ArrayDataset, Dataset
from fedcl.evaluation.predictions import accuracy, backdoor_success, predict
from fedcl.models.flat import FlatModel
from fedcl.runs.retrained import SilentRecord
from fedcl.runs.setup import Setup, make_server
from fedcl.runs.unlearning import make_unlearning
from fedcl.server.loop import Server
from fedcl.server.state import ServerData
from fedcl.simulation.backend import open_backend
from fedcl.unlearning.certificate import Receipt

AT, AFTER = 30, (3, 10)  # the round of the request, and how many rounds later its effect is looked at again
BACKDOOR = 9  # the class that the departing client's marked samples are called
POISONED = 0.8  # share of the departing client's samples that carry the mark
SEQUENCE = (3, 5, 7, 1)  # classes that are asked to be forgotten one after another, a round apart
KINDS = ("client", "class", "sample", "sequence")
SHADOWS = {"sample": 8}  # retrained models of other seeds that the likelihood-ratio attack is fitted to
Numbers = dict[str, float]
Look = Callable[[Tensor], Numbers]


@dataclass(frozen=True)
class Bench:
    """One benchmark: its experiment, where the trigger goes (mask over one sample) and what value it has."""

    name: str
    folder: Path
    label: int  # the class to forget
    mark: Callable[[tuple[int, ...]], np.ndarray]
    high: float
    extra: tuple[tuple[str, tuple[str, ...]], ...] = ()  # further rows: a name and overrides


def centre_checks(size: int) -> Callable[[tuple[int, ...]], np.ndarray]:
    """Return a checkerboard of size x size in the middle of an image: pixels that clean images use too."""

    def mark(shape: tuple[int, ...]) -> np.ndarray:
        chosen = np.zeros(shape, bool)
        high, wide = shape[-2:]
        rows, columns = np.indices((size, size))
        top, left = (high - size) // 2, (wide - size) // 2
        chosen[..., top : top + size, left : left + size] = (rows + columns) % 2 == 0
        return chosen

    return mark


# -- data -------------------------------------------------------------------------------------------------------------


def marked(bench: Bench, x: np.ndarray) -> np.ndarray:
    """Return samples (N, ...) with the trigger on."""
    return np.where(bench.mark(x.shape[1:]), np.asarray(bench.high, x.dtype), x)


def poison(bench: Bench, setup: Setup, departing_client: int, seed: int) -> Setup:
    """Return the run's data with most of the departing client's samples marked and called :data:`BACKDOOR`."""
    held = setup.partition.train[departing_client]
    chosen = numpy_generator(seed, "poison").permutation(held)[: round(POISONED * len(held))]
    x, y = setup.dataset.train.x.copy(), setup.dataset.train.y.copy()
    x[chosen], y[chosen] = marked(bench, x[chosen]), BACKDOOR
    train: ArrayDataset = replace(setup.dataset.train, x=x, y=y)
    return replace(setup, dataset=replace(setup.dataset, train=train))


def requests(bench: Bench, kind: str, setup: Setup, seed: int) -> tuple[str, int]:
    """Return ``unlearning.requests`` of a kind, and the client that leaves (-1: none)."""
    sizes = [len(part) for part in setup.partition.train]
    departing_client = int(np.argmax(sizes))
    if kind == "client":
        return (
            f"[{{id: leaver, scope: client, clients: ['{departing_client}'], at: {{round: {AT}}}}}]",
            departing_client,
        )
    if kind == "class":
        return f"[{{id: class, scope: class, classes: [{bench.label}], at: {{round: {AT}}}}}]", -1
    if kind == "sequence":
        rows = [f"{{id: c{c}, scope: class, classes: [{c}], at: {{round: {AT + i}}}}}" for i, c in enumerate(SEQUENCE)]
        return f"[{', '.join(rows)}]", -1
    count = len(setup.dataset.train.y)
    chosen = sorted(numpy_generator(seed, "request").choice(count, count // 100, replace=False).tolist())
    return f"[{{id: samples, scope: sample, samples: {chosen}, at: {{round: {AT}}}}}]", -1


# -- one case ---------------------------------------------------------------------------------------------------------


@dataclass
class Probe:
    """What is measured of a model besides the unlearning metrics: clean accuracy, and how often the trigger works."""

    bench: Bench
    model: FlatModel
    dataset: Dataset

    def __call__(self, vector: Tensor) -> Numbers:
        """Return rates in [0, 1] on the test half."""
        half = self.dataset.test
        x, y = torch.from_numpy(self.dataset.normalise(half.x)), torch.from_numpy(half.y)
        triggered = torch.from_numpy(self.dataset.normalise(marked(self.bench, half.x)))
        return {
            "clean": accuracy(predict(self.model, vector, x).logits, y),
            "backdoor": backdoor_success(predict(self.model, vector, triggered).logits, y, BACKDOOR),
        }


def trained(cfg: dict[str, Any], setup: Setup, work: Path) -> Any:
    """Return where a run is before the request: the server's state, and the clients'."""
    record: Any = SilentRecord()
    plain = {**cfg, "unlearning": {**cfg["unlearning"], "requests": []}}
    with open_backend(plain, setup.dataset, setup.partition) as backend:
        unlearning = make_unlearning(plain, setup, backend, work)
        server = make_server(plain, setup, backend, record, unlearning=unlearning, evaluate=False)
        server.run(lambda _: None, AT)
        assert backend.states is not None
        kept = {
            c: (v, backend.states.load(c, v)) for c, v in server.exchange.committed.items() if backend.states.has(c, v)
        }
        state = {name: value for name, value in server.state_dict().items() if name != "unlearning"}
        return clone((state, kept), torch.device("cpu"))


def case(bench: Bench, cfg: dict[str, Any], setup: Setup, start: Any, work: Path, look: Look | None = None) -> Numbers:
    """Process the requests of ``cfg`` and run on; return all measurements.

    ``look`` is what else is measured of a model (P,), at once and later; :class:`Probe` by default.
    """
    found: Numbers = {}
    model = make_model(cfg, setup.dataset, setup.stream, torch.device("cpu"))
    probe = look or Probe(bench, model, setup.dataset)
    record: Any = SilentRecord()
    served = 0
    with open_backend(cfg, setup.dataset, setup.partition) as backend:

        def certify(receipt: Receipt, server: ServerData) -> None:
            nonlocal served
            served += 1
            prefix = f"{served}/" if len(cfg["unlearning"]["requests"]) > 1 else ""
            found.update({prefix + name: value for name, value in receipt.measurements.items()})
            found.update({f"{prefix}now/{name}": value for name, value in probe(server.global_model).items()})
            found.update({f"{prefix}cost/{name}": value for name, value in receipt.cost.items()})

        unlearning = make_unlearning(cfg, setup, backend, work, certify=certify)
        server = make_server(cfg, setup, backend, record, unlearning=unlearning, evaluate=False)
        if start is not None and not make_unlearner(cfg).observes:
            state, states = clone(start, torch.device("cpu"))
            assert backend.states is not None
            for client, (visit, tree) in states.items():
                backend.states.stage(client, visit, tree)
            server.load_state_dict(state)
        server.run(lambda r: _after(server, probe, r, found))
    return found


def _after(server: Server, probe: Look, server_round: int, found: Numbers) -> None:
    for rounds in AFTER:
        if server_round == AT + rounds - 1:
            found.update({f"+{rounds}/{name}": value for name, value in probe(server.global_model).items()})


def measure(bench: Bench, kinds: Sequence[str], only: Sequence[str] | None, seeds: Sequence[int], work: Path) -> None:
    """Play what is still to be played; one file a case under ``work``."""
    names = [(name, (f"unlearner={name}",)) for name, _ in list_choices("unlearner")]
    names = sorted([*names, *bench.extra], key=lambda row: row[0] != "retrain")  # first: it fills the cache honestly
    for seed in seeds:
        for kind in kinds:
            start: Any = None
            base = compose([f"experiment={bench.name}", f"seed={seed}", "unlearning.requests=[]"])
            setup = Setup.of(base, load_dataset(base))
            asked, departing_client = requests(bench, kind, setup, seed)
            if departing_client >= 0:
                setup = poison(bench, setup, departing_client, seed)
            cache = work / "references" / f"{kind}-{seed}"
            for name, overrides in names:
                file = work / kind / f"{name}-{seed}.json"
                if file.is_file() or (only and name not in only):
                    continue
                settings = [f"experiment={bench.name}", f"seed={seed}", f"unlearning.cache={cache}"]
                settings.append(f"unlearning.references={SHADOWS.get(kind, 0)}")
                try:
                    cfg = compose([*settings, f"unlearning.requests={asked}", *overrides])
                    Setup.of(cfg, setup.dataset)
                except ConfigError as error:
                    print(f"{kind} {name}: left out, {error}", flush=True)  # not its scope, or not its kind of model
                    continue
                if start is None:
                    start = trained(base, setup, work)
                if name == "retrain":
                    shutil.rmtree(cache, ignore_errors=True)
                began = time.process_time()
                found = case(bench, cfg, setup, start, work)
                found["cpu_seconds"] = time.process_time() - began
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text(json.dumps(found) + "\n", encoding="utf-8")
                print(kind, name, seed, {k: round(v, 3) for k, v in found.items() if k.count("/") == 1}, flush=True)


# -- tables -----------------------------------------------------------------------------------------------------------

COLUMNS: dict[str, list[tuple[str, str, float]]] = {  # heading, key, factor
    "client": [
        ("clean", "now/clean", 100), ("backdoor", "now/backdoor", 100), ("clean +3", "+3/clean", 100),
        ("backdoor +3", "+3/backdoor", 100), ("clean +10", "+10/clean", 100), ("backdoor +10", "+10/backdoor", 100),
    ],
    "class": [
        ("forget test", "forget_test_accuracy", 100), ("retain test", "retain_test_accuracy", 100),
        ("average gap", "gap/average", 100), ("MIA", "mia_entropy", 100), ("KL forget", "kl_forget", 1),
        ("ZRF", "zrf", 1), ("relearn steps", "relearn_steps", 1), ("probe", "linear_probe", 100),
    ],
    "sample": [
        ("forget train", "forget_train_accuracy", 100), ("test", "test_accuracy", 100),
        ("average gap", "gap/average", 100), ("MIA", "mia_entropy", 100), ("KL forget", "kl_forget", 1),
        ("KL retain", "kl_retain", 1), ("LiRA AUC", "lira_auc", 100),
    ],
}  # fmt: skip


def table(kind: str, runs: dict[str, dict[str, Numbers]]) -> str:
    """Return a kind's Markdown table: retraining first, then the others by name."""
    if kind == "sequence":
        return _sequence(runs)
    columns = COLUMNS[kind]
    head = ["unlearner", *(title for title, _, _ in columns), "CPU time / retraining"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for name in sorted(runs, key=lambda name: (name != "retrain", name)):
        cells = []
        for _, key, factor in columns:
            values = [factor * one[key] for one in runs[name].values() if key in one]
            cells.append(spread(values, 1 if factor > 1 else 2) if values else "")
        ratios = [
            one["cost/cpu_seconds"] / runs["retrain"][seed]["cost/cpu_seconds"]
            for seed, one in runs[name].items()
            if seed in runs.get("retrain", {})
        ]
        lines.append(
            f"| {name} | {' | '.join(cells)} | {mean(ratios):.3f} |"
            if ratios
            else f"| {name} | {' | '.join(cells)} | |"
        )
    return "\n".join(lines)


def _sequence(runs: dict[str, dict[str, Numbers]]) -> str:
    head = ["unlearner", *(f"request {i + 1}" for i in range(len(SEQUENCE)))]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for name in sorted(runs, key=lambda name: (name != "retrain", name)):
        cells = []
        for i in range(len(SEQUENCE)):
            pair = [
                spread([100 * one[f"{i + 1}/{key}"] for one in runs[name].values()], 1)
                for key in ("forget_test_accuracy", "retain_test_accuracy")
                if all(f"{i + 1}/{key}" in one for one in runs[name].values())
            ]
            cells.append(" / ".join(pair))
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def compact(results: Any) -> str:
    """Return results as JSON with four significant digits: more would say nothing."""
    rounded = json.loads(json.dumps(results), parse_float=lambda text: float(f"{float(text):.4g}"))
    return json.dumps(rounded, separators=(",", ":")) + "\n"


def main(bench: Bench, description: str) -> None:
    """Read the command line, play, and write results.json and the tables."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="UNLEARNER")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--work", type=Path, default=Path("runs") / bench.name, help="where finished cases are kept")
    parser.add_argument("--dry", action="store_true", help="print the tables and leave the files as they are")
    args = parser.parse_args()
    torch.set_num_threads(1)
    measure(bench, args.kinds, args.only, args.seeds, args.work)
    results: dict[str, dict[str, dict[str, Numbers]]] = {}
    for kind in KINDS:
        for file in sorted((args.work / kind).glob("*.json")):
            name, _, seed = file.stem.rpartition("-")
            results.setdefault(kind, {}).setdefault(name, {})[seed] = json.loads(file.read_text(encoding="utf-8"))
    for kind, runs in results.items():
        text = table(kind, runs)
        print(f"\n{kind}\n{text}")
        if not args.dry:
            rewrite(bench.folder / "README.md", kind, text)
    if not args.dry:
        (bench.folder / "results.json").write_text(compact(results), encoding="utf-8")
