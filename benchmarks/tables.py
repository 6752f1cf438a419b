"""Write the measured tables into the README files beside them: ``python -m benchmarks.tables``.

A table stands between ``<!-- table FILE.json -->`` and ``<!-- end -->``, the marks between ``<!-- marks -->`` and
``<!-- end -->``; what lies between is made from the JSON that ``fedcl bench`` has written, and from nothing else.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedcl.bench.result import Result

HERE = Path(__file__).resolve().parent
_TABLE = re.compile(r"(<!-- table (\S+\.json) -->\n)(.*?)(<!-- end -->)", re.DOTALL)
_MARKS = re.compile(r"(<!-- marks -->\n)(.*?)(<!-- end -->)", re.DOTALL)
MISSING = "not measured yet"


@dataclass(frozen=True)
class Mark:
    """One figure that was asked for: what it is, where it stands, what was to be reached, and what would be better.

    ``figure`` names one of the file's figures, or ``COLUMN of FIRST CELL`` one of its table's.
    """

    what: str
    file: str
    figure: str
    reach: float | None
    stretch: float | None = None
    less: bool = False
    unit: str = ""

    def row(self) -> list[str]:
        """Return the cells of its line: what, ours, reach, stretch, reached."""
        value = figure(self.file, self.figure)
        sign = "<=" if self.less else ">="
        wanted = ["" if mark is None else f"{sign} {mark:g}{self.unit}" for mark in (self.reach, self.stretch)]
        ours = MISSING if value is None else f"{value:.3g}{self.unit}"
        return [self.what, f"[{ours}]({self.file})" if value is not None else ours, *wanted, self._verdict(value)]

    def _verdict(self, value: float | None) -> str:
        if value is None:
            return ""
        if self.stretch is not None and self._holds(value, self.stretch):
            return "stretch"
        if self.reach is None:
            return "no"
        return "yes" if self._holds(value, self.reach) else "NO"

    def _holds(self, value: float, mark: float) -> bool:
        return value <= mark if self.less else value >= mark


MARKS: Sequence[Mark] = (
    Mark("against Flower's stock simulation, MLP 159k, per CPU second", "flower/mlp.json", "cpu", 4, 6, unit="x"),
    Mark("the same on the wall, 2 workers", "flower/mlp.json", "wall", 5, 8, unit="x"),
    Mark("the same, 610 parameters, per CPU second", "flower/logistic.json", "cpu", 12, 30, unit="x"),
    Mark("the same, LeNet, per CPU second", "flower/lenet.json", "cpu", 1.5, 2, unit="x"),
    Mark("the same, ResNet-8, per CPU second", "flower/resnet8.json", "cpu", 0.98, unit="x"),
    Mark("against pfl 0.6.0, MLP, per CPU second", "pfl/mlp.json", "cpu", 1.4, 2, unit="x"),
    Mark("share of the hardware limit, MLP", "engine/mlp.json", "auto", 0.50, 0.70),
    Mark("share of the hardware limit, LeNet", "engine/lenet.json", "auto", 0.65, 0.72),
    Mark("overhead a client beyond its steps, inline, 610 parameters", "overhead/logistic.json", "inline_constant_us",
         150, 60, less=True, unit=" us"),
    Mark("the same, ray", "overhead/logistic.json", "ray_constant_us", 400, 150, less=True, unit=" us"),
    Mark("overhead a client beyond its steps, inline, MLP 159k", "overhead/mlp.json", "inline_constant_us", 150,
         60, less=True, unit=" us"),
    Mark("the same, ray", "overhead/mlp.json", "ray_constant_us", 400, 150, less=True, unit=" us"),
    Mark("10,000 clients in one round: memory of a further client", "scale/mlp.json", "kb_10000", 1, less=True,
         unit=" kB"),
    Mark("10,000 clients in one round, MLP, 2 workers", "scale/mlp.json", "seconds_10000", None, 25, less=True,
         unit=" s"),
    Mark("efficiency of two workers, idle cores", "hetero/mlp.json", "efficiency", 0.9, 0.95),
    Mark("useful work, log-normal sizes, sigma 1", "hetero/mlp.json", "useful_1", 0.9, 0.97),
    Mark("continual hooks, EWC: times the bare mathematics", "learners/results.json", "ratio of ewc", 1.1, less=True),
    Mark("continual hooks, ER: times the bare mathematics", "learners/results.json", "ratio of er", 1.1, less=True),
    Mark("continual hooks, LwF: times the bare mathematics", "learners/results.json", "ratio of lwf", 1.1, less=True),
)  # fmt: skip


def read(file: str, folder: Path = HERE) -> Mapping[str, Any] | None:
    """Return a measurement's JSON; None if it has not been made."""
    path = folder / file
    if not path.is_file():
        return None
    found: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def figure(file: str, name: str) -> float | None:
    """Return one figure of a measurement; None if it has not been made, or could not be finished."""
    found = read(file)
    if found is None:
        return None
    column, _, first = name.partition(" of ")
    if first:
        return next((float(row[column]) for row in found["rows"] if next(iter(row.values())) == first), None)
    value = found.get("figures", {}).get(name)
    return None if value is None else float(value)


def marks() -> str:
    """Return the table of marks."""
    lines = [["what", "fedcl", "reach", "stretch", "reached"], *(mark.row() for mark in MARKS)]
    lines.insert(1, ["---"] * 5)
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def table(file: str, folder: Path) -> str:
    """Return a measurement's table, its notes, and what it was made on."""
    found = read(file, folder)
    if found is None:
        return f"{MISSING}\n"
    result = Result(found["bench"], found["ratio"], found["passed"], found["rows"])
    versions, machine = found["versions"], found["machine"]
    before = found.get("loadavg_before")
    load = (
        f"{found['loadavg'][0]:.1f} after"
        if before is None
        else f"{before:.1f} before, {found['loadavg'][0]:.1f} after"
    )
    notes = "".join(f"\n{note[0].upper()}{note[1:]}.\n" for note in found.get("notes", ()))
    made = ", ".join(f"{name} {versions[name]}" for name in ("torch", "flwr", "ray"))
    where = f"Python {machine['python']}, {machine['cpu_count']} cores; load average {load}"
    return f"\n{result.table()}\n{notes}\n{made}, {where}; `ratio` {found['ratio']:.3g}.\n\n"


def rendered(readme: Path) -> str:
    """Return the text of a README with its tables as the JSON files have them."""
    text = readme.read_text(encoding="utf-8")
    text = _TABLE.sub(lambda found: f"{found[1]}{table(found[2], readme.parent)}{found[4]}", text)
    return _MARKS.sub(lambda found: f"{found[1]}\n{marks()}\n{found[3]}", text)


def readmes() -> list[Path]:
    """Return the README files that hold such tables."""
    found = [HERE / "README.md", *sorted(HERE.glob("*/README.md"))]
    return [path for path in found if re.search("<!-- (table|marks) ", path.read_text(encoding="utf-8"))]


def main() -> None:
    """Rewrite every table."""
    for readme in readmes():
        text = rendered(readme)
        if text != readme.read_text(encoding="utf-8"):
            readme.write_text(text, encoding="utf-8")
            print(readme.relative_to(HERE.parent))


if __name__ == "__main__":
    main()
