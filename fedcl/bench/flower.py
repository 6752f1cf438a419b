"""How much faster a round is than under Flower's stock simulation."""

from __future__ import annotations

import os
from collections.abc import Sequence

from torch import Tensor

from fedcl.bench.federation import federation
from fedcl.bench.processes import tree_seconds
from fedcl.bench.result import Result, Row
from fedcl.bench.rival import Rival
from fedcl.bench.turns import Side, ratio, take_turns
from fedcl.bench.workload import Workload, known

# (per CPU-second, on the wall); None: no mark
MARKS: dict[str, tuple[float, float | None]] = {
    "mlp": (4.0, 5.0), "logistic": (12.0, None), "lenet": (1.5, None), "resnet8": (0.98, None)
}  # fmt: skip
REPETITIONS, WORKERS, TOLERANCE = 5, 2, 5e-4


def flower(model: str = "mlp", repetitions: int = REPETITIONS) -> Result:
    """Run the same rounds under Flower's simulation and on fedcl's Ray workers, in turn, both on two workers.

    Both train the same network from the same weights on the same batches in the same order; both have started and
    run their first rounds before anything is measured. Processor time is that of all processes of a side.

    Returns
    -------
    Result
        One row a side. ``ratio`` is Flower's processor time over fedcl's; passed if the marks are reached and the two
        final models are the same up to rounding.
    """
    workload = Workload(known(model))
    rival = Rival("fedcl.bench.flower_app", workload)
    backend = ("backend=ray", f"backend.workers={WORKERS}")
    return against(rival, workload, backend, repetitions, ("flower", "Flower's simulation"), MARKS[model])


def against(
    rival: Rival,
    workload: Workload,
    backend: Sequence[str],
    repetitions: int,
    names: tuple[str, str],
    marks: tuple[float, float | None],
) -> Result:
    """Run the same rounds with a rival and with fedcl on ``backend``, in turn.

    ``names`` are the measurement's and the rival's, ``marks`` those of processor time and wall time.
    """
    with rival, federation(workload, *backend) as own:
        me = os.getpid()
        sides = [
            rival.side(names[1]),
            own.side(f"fedcl, {backend[0]}", lambda: tree_seconds(me, without=[rival.pid])),
        ]
        take_turns(sides, workload.rounds, repetitions)
        apart = distance(own.weights(), rival.weights())
    return compared(names[0], workload, sides, apart, *marks)


def distance(own: Tensor, other: Tensor) -> float:
    """Return how far two models (P,) are apart, relative to their length."""
    return float((own - other).norm() / own.norm())


def compared(
    name: str, workload: Workload, sides: list[Side], apart: float, cpu_mark: float, wall_mark: float | None
) -> Result:
    """Return the table of a rival and fedcl, which have taken turns in that order."""
    reference, own = sides
    clients = workload.rounds * len(workload.sizes)
    figures = {"cpu": ratio(reference, own, "cpu"), "wall": ratio(reference, own, "wall"), "apart": apart}
    rows: list[Row] = [
        {
            "model": workload.model,
            "simulator": side.name,
            "clients a CPU second": f"{clients / side.median('cpu'):.0f}",
            "clients a second": f"{clients / side.median('wall'):.0f}",
            "times, CPU": f"{ratio(reference, side, 'cpu'):.2f}",
            "mark ": f">= {cpu_mark:g}" if side is own else "",
            "times, wall": f"{ratio(reference, side, 'wall'):.2f}",
            "mark": f">= {wall_mark:g}" if side is own and wall_mark else "",
        }
        for side in sides
    ]
    reached = figures["cpu"] >= cpu_mark and (wall_mark is None or figures["wall"] >= wall_mark)
    same = apart <= TOLERANCE
    spans = [f"{one.cpu / other.cpu:.2f}" for one, other in zip(reference.turns, own.turns, strict=True)]
    notes = (
        f"final models {'agree' if same else 'DIFFER'}: {apart:.1e} of their length apart, after the same steps",
        f"{len(own.turns)} repetitions of {workload.rounds} rounds; times, CPU, of each: {', '.join(spans)}",
    )
    return Result(name, figures["cpu"], reached and same, rows, figures, notes)
