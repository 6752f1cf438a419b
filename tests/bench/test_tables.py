from __future__ import annotations

import importlib.util
import json
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

from fedcl.bench.result import Result

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def tables() -> ModuleType:
    spec = importlib.util.spec_from_file_location("benchmark_tables", ROOT / "benchmarks" / "tables.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where its dataclass looks for its own annotations
    spec.loader.exec_module(module)
    return module


def test_the_committed_tables_are_the_committed_results(tables: ModuleType) -> None:
    stale = [path.name for path in tables.readmes() if tables.rendered(path) != path.read_text(encoding="utf-8")]
    assert not stale, "run: python -m benchmarks.tables"
    assert len(tables.readmes()) >= 7


def test_every_result_is_in_a_table_and_every_mark_has_a_place(tables: ModuleType) -> None:
    text = "".join(path.read_text(encoding="utf-8") for path in tables.readmes())
    for mark in tables.MARKS:
        folder, name = mark.file.split("/")
        assert (ROOT / "benchmarks" / folder / "README.md").is_file()
        assert folder == "learners" or f"<!-- table {name} -->" in text


def test_a_table_is_made_of_its_json(tables: ModuleType, tmp_path: Path) -> None:
    rows = [{"what": "a", "n": 1}, {"what": "b", "n": 2}]
    result = Result("x", 2.5, True, rows, {"cpu": 2.5}, ("models agree",))
    (tmp_path / "x.json").write_text(result.to_json(0.25))
    readme = tmp_path / "README.md"
    readme.write_text("# X\n<!-- table x.json -->\nold\n<!-- end -->\nafter\n<!-- table y.json -->\n<!-- end -->\n")
    once = tables.rendered(readme)
    assert re.search(r"\| a +\| 1 \|\n\| b +\| 2 \|\n\nModels agree\.\n", once)
    assert "load average 0.2 before" in once
    assert "old" not in once
    assert "after\n<!-- table y.json -->\nnot measured yet\n<!-- end -->" in once
    readme.write_text(once)
    assert tables.rendered(readme) == once


@pytest.mark.parametrize(
    ("value", "less", "verdict"),
    [(3.0, False, "NO"), (4.0, False, "yes"), (6.5, False, "stretch"), (7.0, True, "NO"), (6.0, True, "stretch")],
)
def test_a_mark_is_reached_or_not(
    value: float, less: bool, verdict: str, tables: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "m.json").write_text(json.dumps({"figures": {"cpu": value}, "rows": [{"way": "er", "times": "1.5"}]}))
    monkeypatch.setattr(tables, "HERE", tmp_path)
    monkeypatch.setattr(tables.read, "__defaults__", (tmp_path,))
    mark = tables.Mark("m", "m.json", "cpu", 4.0, 6.0, less=less, unit="x")
    assert mark.row() == ["m", f"[{value:g}x](m.json)", *(f"{'<=' if less else '>='} {n}x" for n in (4, 6)), verdict]
    assert tables.figure("m.json", "times of er") == 1.5
    assert tables.figure("m.json", "times of ewc") is None
    assert tables.Mark("m", "absent.json", "cpu", 4.0).row()[1] == "not measured yet"
