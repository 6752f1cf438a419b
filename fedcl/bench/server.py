"""How fast is the server's mathematics? FedCAC's overlap, FOT's basis, weighted sum, each against the obvious way."""

# K = clients, P = parameters, D = inputs of a layer, M = columns of the pooled inputs, N = directions
from __future__ import annotations

import functools
import re
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import permutations
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedcl.base.linalg import leading, random_signs
from fedcl.base.randomness import torch_generator
from fedcl.bench.result import Cell, Result
from fedcl.config.instantiate import locate
from fedcl.contracts.strategy import GLOBAL, Collaboration, Update
from fedcl.contracts.view import Response
from fedcl.models.flat import Spec, TensorSpec
from fedcl.models.masks import pack_bits
from fedcl.server.aggregation import BLOCK, aggregate

OVERLAP_MARK, BASIS_MARK, FOLD_MARK = 50.0, 20.0, 0.5
ENERGY = 1e-3  # share of the inputs' energy by which the two bases may differ
EPSILON = 0.9


@dataclass(frozen=True)
class Sizes:
    """How large the measurement is: masks, layer and pooled inputs, updates, and how often everything is repeated."""

    clients: int = 100
    positions: int = 10_000_000
    pairs: int = 6
    inputs: int = 4608
    columns: int = 5000
    width: int = 512
    updates: int = 100
    parameters: int = 1_000_000
    repeats: int = 3


@dataclass
class Case:
    """One way of doing something: what is called, and the processor's seconds of each repetition.

    With one thread these are the clock's, less the time that other processes have had. ``scale`` says how many such
    calls it stands for, ``value`` is what the last call returned, ``extra`` the most memory it took beyond what the
    process held, in MB.
    """

    name: str
    call: Callable[[], Any]
    scale: float = 1.0
    seconds: list[float] = field(default_factory=list)
    value: Any = None
    extra: float = 0.0

    def run(self) -> None:
        """Call once more."""
        self.value = None
        before = _reset_peak()
        started = time.process_time()
        self.value = self.call()
        self.seconds.append(self.scale * (time.process_time() - started))
        self.extra = max(self.extra, _peak() - before)


def server(sizes: Sizes | None = None) -> Result:
    """Measure the server's three heavy computations against the obvious way, interleaved, in one process.

    Returns
    -------
    Result
        One row a way. ``ratio`` is the smallest of the three marks' measured shares (1 or more: reached); ``passed``
        says that every mark is reached and every check holds.
    """
    sizes = sizes or Sizes()
    torch.set_num_threads(1)
    groups = [_overlap(sizes), _basis(sizes), _fold(sizes)]
    for group in groups * sizes.repeats:
        for case in group.cases * group.times:
            case.run()
    rows = [row for group in groups for row in group.rows()]
    marks = [group.ratio() / group.mark for group in groups]
    passed = min(marks) >= 1 and all(group.sound() for group in groups)
    return Result("server", min(marks), passed, rows)


@dataclass
class Group:
    """Ways of computing one thing: the first is the reference, the last is what has to reach ``mark``.

    ``check`` says in words how a way's value compares, and whether that is as promised. The ways take turns ``times``
    times in each repetition.
    """

    what: str
    cases: list[Case]
    mark: float
    check: Callable[[Case], tuple[str, bool]]
    times: int = 1

    def ratio(self, case: Case | None = None) -> float:
        """Return the median over repetitions of reference seconds / seconds of the case (None: the last)."""
        case = case or self.cases[-1]
        pairs = zip(self.cases[0].seconds, case.seconds, strict=True)
        return statistics.median(reference / own for reference, own in pairs)

    def sound(self) -> bool:
        """Whether every way's result is as promised."""
        return all(self.check(case)[1] for case in self.cases)

    def rows(self) -> list[dict[str, Cell]]:
        """Return the table's rows."""
        rows: list[dict[str, Cell]] = []
        for case in self.cases:
            marked = case is self.cases[-1]
            rows.append(
                {
                    "what": self.what,
                    "way": case.name,
                    "CPU seconds": f"{statistics.median(case.seconds):.3g}",
                    "min .. max": f"{min(case.seconds):.3g} .. {max(case.seconds):.3g}",
                    "ratio": f"{self.ratio(case):.3g}",
                    "mark": f">= {self.mark:g}" if marked else "",
                    "reached": ("yes" if self.ratio(case) >= self.mark else "NO") if marked else "",
                    "more memory, MB": f"{case.extra:.0f}",
                    "result": self.check(case)[0],
                }
            )
        return rows


# -- FedCAC's overlap ------------------------------------------------------------------------------------------------


def _overlap(sizes: Sizes) -> Group:
    generator = torch_generator("bench", "masks")
    masks_KP = torch.empty(sizes.clients, sizes.positions, dtype=torch.bool)
    for mask in masks_KP:
        mask.copy_(torch.randint(0, 2, (sizes.positions,), generator=generator, dtype=torch.uint8))
    packed_KB = pack_bits(masks_KP)
    every = list(permutations(range(sizes.clients), 2))
    pairs = every[:: max(1, len(every) // sizes.pairs)][: sizes.pairs]
    floats = {client: masks_KP[client].float() for pair in pairs for client in pair}

    def loop() -> list[float]:
        found = []
        for i, j in pairs:
            differing, own = float((floats[i] - floats[j]).abs().sum()), float(floats[i].sum())
            found.append(1 - differing / (2 * own))
        return found

    module = "strategies.collaboration.fedcac"
    cases = [
        Case(f"loop over pairs, float ({len(pairs)} of {len(every)} timed, scaled)", loop, len(every) / len(pairs)),
        Case("fedcac.overlap of bool masks", functools.partial(locate(f"{module}.overlap"), masks_KP)),
        Case(
            "fedcac.overlap_packed, as the strategy keeps them",
            functools.partial(locate(f"{module}.overlap_packed"), packed_KB, sizes.positions),
        ),
    ]

    def check(case: Case) -> tuple[str, bool]:
        if case is cases[0]:
            return "", True
        equal = [float(case.value[i, j]) for i, j in pairs] == cases[0].value
        return f"{'equal to' if equal else 'DIFFERS FROM'} the loop's on the {len(pairs)} pairs", equal

    what = f"overlap of {sizes.clients} x {sizes.positions:.0e}".replace("e+0", "e")
    return Group(what, cases, OVERLAP_MARK, check)


# -- FOT's basis -----------------------------------------------------------------------------------------------------


def pooled_inputs(sizes: Sizes) -> Tensor:
    """Return A (D, M), float32: energies that fall as k^-1.4 along random directions, and a little noise."""
    generator = torch_generator("bench", "inputs")
    rank = sizes.inputs // 4
    strength = torch.arange(1, rank + 1).float() ** -0.7
    mixed_DM = (torch.randn(sizes.inputs, rank, generator=generator) * strength) @ torch.randn(
        rank, sizes.columns, generator=generator
    )
    return mixed_DM + 0.02 * torch.randn(sizes.inputs, sizes.columns, generator=generator)


def _basis(sizes: Sizes) -> Group:
    inputs_DM = pooled_inputs(sizes)
    parts = [part.T.contiguous() for part in inputs_DM.chunk(10, dim=1)]
    empty, cpu = torch.zeros(sizes.inputs, 0), torch.device("cpu")
    draw = torch.tensor([7, sizes.width])
    signs = random_signs(sizes.inputs, sizes.width, 7)
    client, from_ranges = locate("clients.strategies.fot.Range"), locate("strategies.projection.subspace.from_ranges")

    def by_svd() -> Tensor:
        directions, singular, _ = torch.linalg.svd(inputs_DM, full_matrices=False)
        kept: Tensor = directions[:, : leading(singular.square(), EPSILON)]
        return kept

    def by_range() -> Tensor:
        answers = []
        for number, rows in enumerate(parts):
            summary = client(empty, signs)
            summary.add(rows)
            answers.append(Response(str(number), len(rows), summary.tensors("layer")))
        found: Tensor = from_ranges(answers, "layer", EPSILON, cpu, draw).directions_DN
        return found

    cases = [
        Case("full SVD of the pooled inputs", by_svd),
        Case(f"range finder of 10 clients, {sizes.width} columns, clients' work included", by_range),
    ]

    def check(case: Case) -> tuple[str, bool]:
        exact_DN = cases[0].value
        count = min(case.value.shape[1], exact_DN.shape[1])
        own, exact = (_captured(inputs_DM, basis[:, :count]) for basis in (case.value, exact_DN))
        held = _captured(inputs_DM, case.value)
        text = f"{case.value.shape[1]} directions hold {held:.4f}; the first {count} {exact - own:.0e} less than SVD's"
        return text, exact - own <= ENERGY and held >= EPSILON - 1e-6

    return Group(f"basis, {sizes.inputs} x {sizes.columns}", cases, BASIS_MARK, check)


def _captured(inputs_DM: Tensor, basis_DN: Tensor) -> float:
    """Return the share of the inputs' energy that a basis holds."""
    within = basis_DN.float().T @ inputs_DM
    return float(within.double().square().sum() / inputs_DM.double().square().sum())


# -- the weighted sum ------------------------------------------------------------------------------------------------


def _fold(sizes: Sizes) -> Group:
    generator = torch_generator("bench", "updates")
    size = sizes.parameters
    spec = Spec([TensorSpec("weight", (size,), 0, size, "parameter", None)])
    base = torch.randn(size, generator=generator)
    updates = [
        Update(str(i), 0, GLOBAL, 0, base, base + 0.01 * torch.randn(size, generator=generator), 5, 0.5 + i, 0, 0)
        for i in range(sizes.updates)
    ]
    term = Collaboration().term
    cases = [
        Case("reading the models once (their sums)", lambda: [float(update.model.sum()) for update in updates]),
        Case("whole changes, one after the other", lambda: _plainly(updates, size)),
        Case("fold, any term", lambda: aggregate(updates, term, spec).total),
        Case(
            "fold, changes in pieces", lambda: aggregate(updates, term, spec, weight=lambda update: update.weight).total
        ),
    ]
    megabytes = 4e-6 * size * sizes.updates

    def check(case: Case) -> tuple[str, bool]:
        speed = f"{megabytes / 1000 / statistics.median(case.seconds):.2f} GB/s"
        if case is cases[0]:
            return speed, True
        equal = torch.equal(case.value, cases[1].value)
        return f"{speed}; {'same' if equal else 'OTHER'} bits", equal

    return Group(f"fold of {sizes.updates} x {size:.0e}".replace("e+0", "e"), cases, FOLD_MARK, check, times=5)


def _plainly(updates: Sequence[Update], size: int) -> Tensor:
    """Return the sum as it is defined: whole changes, block by block in order, in float64."""
    total = torch.zeros(size, dtype=torch.float64)
    for start in range(0, len(updates), BLOCK):
        block_total = torch.zeros(size, dtype=torch.float64)
        for update in updates[start : start + BLOCK]:
            block_total.add_(update.model.double() - update.base.double(), alpha=update.weight)
        total += block_total
    return total


# -- memory ----------------------------------------------------------------------------------------------------------


def _reset_peak() -> float:
    """Forget the process's highest memory so far, where the system can (Linux); return what it holds now, in MB."""
    resettable = Path("/proc/self/clear_refs")
    if resettable.exists():
        resettable.write_text("5")
    return _peak()


def _peak() -> float:
    status = Path("/proc/self/status")
    found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text()) if status.exists() else None
    return int(found[1]) / 1000 if found else 0.0
