"""Every choice of every group keeps the contracts, and any two choices of different groups run together.

Choices are discovered: a new YAML is covered without a line here; settings that make it small enough go into
``tests/toy.py``, pairs that are refused into ``tests/refused_pairs.yaml``.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor

from fedcl.base.tree import equal
from fedcl.config.compose import ConfigError, compose, config_hash, kinds, list_choices
from fedcl.runs.setup import Setup
from tests.toy import PARTS, Choices, Diary, configure, label, missing, run_toy, write_files

# State and payload keys that may stay as they are while nothing goes wrong and nobody is forgotten.
STEADY = {"epoch", "control_epoch", "memory", "stale"}
GROUPS = {
    group: [name for name, _ in list_choices(group)]
    for group in kinds()
    if group not in ("experiment", "protocol", "trackers", "unlearner")
}
SINGLES: list[Choices] = [{group: choice} for group, names in GROUPS.items() for choice in names]
Pair = frozenset[str]  # of two "group=choice"


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return write_files(tmp_path_factory.mktemp("toy"))


def losses(diary: Diary) -> Iterator[tuple[int, float, float]]:
    """Yield (task, loss of the first step in its first round, mean loss in its last round), means over samples."""
    table: dict[tuple[int, int], dict[str, dict[str, float]]] = defaultdict(lambda: defaultdict(dict))
    for row in diary.rows:
        if row["phase"] == "train":
            table[row["task"], row["round"]][row["name"]][row["client"]] = row["value"]
    for task in sorted({task for task, _ in table}):
        rounds = [table[key] for key in sorted(table) if key[0] == task]
        first, last = (
            np.average([r[name][c] for c in r[name]], weights=[r["num_examples"][c] for c in r[name]])
            for r, name in ((rounds[0], "loss_first"), (rounds[-1], "loss"))
        )
        yield task, float(first), float(last)


def kept(saved: list[dict[str, Any]]) -> dict[str, list[Any]]:
    """Return the values over the rounds of every key of the strategy's (``strategy:``) and the plugins' state."""
    values: dict[str, list[Any]] = defaultdict(list)
    for state in saved:
        strategy = state["server"]["strategy"]
        parts = strategy if all(isinstance(part, dict) for part in strategy.values()) else {"stock": strategy}
        trees = {f"strategy:{role}": part for role, part in parts.items()}
        for client, (_, own) in state["clients"].items():
            trees |= {f"{client}:{plugin}": tree for plugin, tree in own["plugins"].items()}
        for place, tree in trees.items():
            for name, value in tree.items():
                values[f"{place}:{name}"].append(value)
    return values


def frozen_state(diary: Diary, *, stock: bool) -> list[str]:
    """Return the keys whose value neither appears nor changes during the run, at any client."""
    moved: dict[str, bool] = {}
    for place, values in kept(diary.saved).items():
        owner, part, name = place.split(":")
        if name in STEADY or (stock and not isinstance(values[0], (dict, Tensor))):
            continue  # numbers of a Flower strategy are its settings
        key = f"{'strategy ' if owner == 'strategy' else ''}{part}.{name}"
        changes = len(values) < len(diary.saved) and owner == "strategy"
        moved[key] = moved.get(key, False) or changes or any(not equal(values[0], value) for value in values)
    return [key for key, changes in moved.items() if not changes]


def dull_payloads(diary: Diary) -> list[str]:
    """Return the declared payloads that never travel, and those of training that are always the same."""
    dull = []
    for payload in diary.payloads:
        way = (payload.direction, payload.name)
        # sums travel as <query>/<tensor>
        seen = [ts for (to, name), ts in diary.traffic.items() if (to, name.split("/")[0]) == way]
        if not seen or not (payload.name in STEADY or all(any(not torch.equal(ts[0], t) for t in ts) for ts in seen)):
            dull.append(f"{payload.name} {payload.direction}")
    return dull


# networks that differ from model=resnet8 in their size alone
LARGE = ("model=resnet10", "model=resnet18")
KEPT: set[tuple[str, bool]] = set()  # configurations that have been found to keep the contracts, and with edges or not


@pytest.mark.parametrize(
    "choices",
    [pytest.param(one, marks=[pytest.mark.slow] if label(one) in LARGE else []) for one in SINGLES],
    ids=label,
)
def test_every_choice_keeps_the_contracts(choices: Choices, files: dict[str, str], device: torch.device) -> None:
    why = missing(label(choices))
    if why:
        pytest.skip(why)
    cfg = configure(choices, files, device)
    edges = not choices.keys() & {"data", "data/partition"}
    if (key := (config_hash(cfg), edges)) in KEPT:
        return  # a choice that is the default is the same run
    whole = run_toy(cfg, edges=edges)
    assert whole.faults == []
    assert [task for task, first, last in losses(whole) if not last < first] == []
    assert len(set(whole.hashes)) == len(whole.hashes)
    assert frozen_state(whole, stock="stock" in cfg["strategy"]) == []
    assert dull_payloads(whole) == []
    middle = len(whole.hashes) // 2
    rest = run_toy(cfg, edges=edges, start=whole.saved[middle])
    assert rest.hashes == whole.hashes[middle:]
    assert equal(rest.saved[-1], whole.saved[-1])
    assert run_toy(cfg, edges=edges, until=0).hashes == whole.hashes[:1]
    assert run_toy({**cfg, "seed": 1}, edges=edges, until=0).hashes[0] != whole.hashes[0]
    KEPT.add(key)


def test_the_toy_has_the_edges_it_promises(files: dict[str, str], device: torch.device) -> None:
    diary = run_toy(configure({}, files, device), edges=True)
    sizes = {(r["task"], r["client"]): r["value"] for r in diary.rows if r["name"] == "num_examples"}
    assert {client for task, client in sizes if task == 0} == {"0", "1", "2", "3"}
    assert {client for task, client in sizes if task == 1} == {"0", "3"}
    assert {client for task, client in sizes if task == 2} == {"0", "1", "3"}
    assert sizes[0, "2"] == 1


def test_the_checks_see_what_never_changes(files: dict[str, str], device: torch.device) -> None:
    diary = run_toy(configure({"strategy/collaboration": "scaffold", "learner": "er"}, files, device))
    assert (frozen_state(diary, stock=False), dull_payloads(diary)) == ([], [])
    diary.saved = [diary.saved[-1]] * 3
    assert frozen_state(diary, stock=False) == [
        "strategy collaboration.control",
        *(f"learner.er.{name}" for name in ("x", "y", "task", "seen")),
        "strategy.collaboration.client.control",
    ]
    diary.traffic["up", "control_delta"] = [torch.zeros(2)] * 3
    del diary.traffic["down", "control"]
    assert sorted(dull_payloads(diary)) == ["control down", "control_delta up"]


@pytest.mark.parametrize("name", [name for name, _ in list_choices("experiment")])
def test_every_experiment_composes(name: str) -> None:
    assert compose([f"experiment={name}"])["num_clients"] >= 1


# -- pairs ----------------------------------------------------------------------------------------------------------

REFUSED: dict[Pair, str] = {
    frozenset(pair.split(" + ")): reason
    for pair, reason in yaml.safe_load((Path(__file__).parent / "refused_pairs.yaml").read_text()).items()
}


def names(row: Choices) -> list[str]:
    return [f"{group}={choice}" for group, choice in row.items()]


def pairs_of(row: Choices) -> set[Pair]:
    return {frozenset(pair) for pair in combinations(names(row), 2)}


def together(a: tuple[str, str], b: tuple[str, str]) -> bool:
    """Whether two (group, choice) can occur in one run: a stock strategy has no parts."""
    stock = any(group == "strategy" and choice != "pipeline" for group, choice in (a, b))
    return a[0] != b[0] and not (stock and (a[0] in PARTS or b[0] in PARTS))


def covering_array(groups: dict[str, list[str]], refused: set[Pair], seed: int = 0) -> list[Choices]:
    """Return rows of choices such that every pair that can run together, and is not refused, is in one; greedy."""
    rng = np.random.default_rng(seed)
    singles = [(group, choice) for group, options in groups.items() for choice in options]
    place = {single: i for i, single in enumerate(singles)}
    fits = np.zeros((len(singles), len(singles)), bool)  # pairs that may be in a row
    for a, b in combinations(singles, 2):
        pair = frozenset(("=".join(a), "=".join(b)))
        fits[place[a], place[b]] = fits[place[b], place[a]] = together(a, b) and pair not in refused
    left = fits.copy()
    wanted = [(a, b) for a, b in combinations(range(len(singles)), 2) if fits[a, b]]
    rows = []
    for first in wanted:
        if not left[first]:
            continue
        row = list(first)
        taken = {singles[i][0] for i in row}
        for group in rng.permutation([group for group in groups if group not in taken]).tolist():
            options = np.array([place[group, choice] for choice in rng.permutation(groups[group]).tolist()])
            fitting = options[fits[options][:, row].all(1)]
            if len(fitting):
                row.append(int(fitting[left[fitting][:, row].sum(1).argmax()]))
        rows.append({singles[i][0]: singles[i][1] for i in row})
        left[np.ix_(row, row)] = False
    return rows


SKETCHED = ("fot", "fot_official")
# Large networks and sources of files take seconds a run and differ from the others in nothing that a part can see: they
# meet the toy's defaults, in the test of every choice, and what they are needed for.
HEAVY = {
    "model=resnet10", "model=resnet18", "model=vit", "model=char_transformer", "data=cifar10", "data=cifar100",
    "data=cifar100_subset", "data=folder", "data=text", "data=hf", "data=mnist", "data=fashion_mnist",
    "data/partition=natural_id", "data/partition=flwr",
}  # fmt: skip
HERE = {
    group: [c for c in options if f"{group}={c}" not in HEAVY and missing(f"{group}={c}") is None]
    for group, options in GROUPS.items()
}
ROWS = covering_array(HERE, set(REFUSED))


# The array has a row for each pair of the two largest groups; the default run takes a spread of them, -m slow the rest.
# FEDCL_PAIRS=k/n takes every n-th of these from the k-th on: what has forty minutes takes the parts in turn.
SPREAD = max(1, len(ROWS) // 20)
PART, PARTS_OF = map(int, os.environ.get("FEDCL_PAIRS", "0/1").split("/"))
QUICK = [row for i, row in enumerate(ROWS) if i % SPREAD == 0]
OTHERS = [row for i, row in enumerate(ROWS) if i % SPREAD and i % PARTS_OF == PART]


@pytest.mark.parametrize("row", [*QUICK, *(pytest.param(row, marks=pytest.mark.slow) for row in OTHERS)], ids=label)
def test_any_two_choices_run_together(row: Choices, files: dict[str, str], device: torch.device) -> None:
    # narrow sketches: an exact subspace of a real data set's inputs takes seconds
    small = ["strategy.projection.server.method=sketch", "strategy.projection.server.sketch_width=8"]
    extra = ["rounds_per_task=1", "client.epochs=1", *(small if row.get("strategy/projection") in SKETCHED else [])]
    diary = run_toy(configure(row, files, device, *extra, num_tasks=2))
    # where clients go different ways, those of one round may hold nothing of their tasks
    apart = row.get("scenario/schedule", "synchronous") != "synchronous"
    assert [one for one in diary.faults if not (apart and one["kind"] == "round_skipped" and one["replies"])] == []
    assert len(diary.hashes) == diary.rounds >= (1 if row["scenario"] == "joint" else 2)


@pytest.mark.parametrize("pair", REFUSED, ids=lambda pair: " ".join(sorted(pair)))
def test_refused_pairs_are_refused_and_say_why(pair: Pair, files: dict[str, str], device: torch.device) -> None:
    for choice in pair:
        if why := missing(choice):
            pytest.skip(why)
    with pytest.raises(ConfigError) as caught:
        Setup.of(configure(dict(choice.split("=", 1) for choice in sorted(pair)), files, device, num_tasks=2))
    assert REFUSED[pair] in str(caught.value)


def test_the_array_covers_every_pair() -> None:
    covered = set().union(*(pairs_of(row) for row in ROWS))
    singles = [(group, choice) for group, options in HERE.items() for choice in options]
    wanted = {frozenset((f"{a[0]}={a[1]}", f"{b[0]}={b[1]}")) for a, b in combinations(singles, 2) if together(a, b)}
    assert wanted - covered == wanted & set(REFUSED)
    assert len(ROWS) < 3 * max(len(a) * len(b) for a, b in combinations(HERE.values(), 2))
