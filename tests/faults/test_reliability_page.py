"""docs/reliability.md names tests: each must exist, and each fault must have one."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
NAMED = sorted(set(re.findall(r"`(tests/[\w/.]+\.py(?:::\w+)+)`", PAGE)))


def _tests(file: Path) -> set[str]:
    """Return the names of a file's tests; those of a class with the class before them."""
    names = set()
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
            names.add(node.name)
        elif isinstance(node, ast.ClassDef):
            inner = [method.name for method in node.body if isinstance(method, ast.FunctionDef)]
            names |= {f"{node.name}::{name}" for name in inner if name.startswith("test_")}
    return names


def test_every_named_test_exists() -> None:
    assert len(NAMED) > 50
    missing = []
    for name in NAMED:
        file, _, test = name.partition("::")
        if not (ROOT / file).is_file() or test not in _tests(ROOT / file):
            missing.append(name)
    assert not missing


def test_every_mention_of_a_test_is_one_that_was_checked() -> None:
    assert sorted(set(re.findall(r"`(tests/[^`]+)`", PAGE))) == NAMED


def test_every_fault_has_a_test() -> None:
    rows = [line.split("|") for line in PAGE.splitlines() if re.match(r"\| \d+ \|", line)]
    numbers = [int(row[1]) for row in rows]
    assert numbers == [*range(1, 27), 28, 29, 30, 31]
    for row in rows:
        assert "`tests/" in row[4]


def test_the_tests_of_faults_are_all_on_the_page() -> None:
    files = [file for file in (ROOT / "tests" / "faults").glob("test_*.py") if file != Path(__file__)]
    tests = {f"{file.relative_to(ROOT)}::{test}" for file in files for test in _tests(file)}
    checks = {  # what these tests rest on, or what must not be too strict
        "tests/faults/test_updates.py::test_the_norm_of_a_change_by_hand",
        "tests/faults/test_updates.py::test_updates_of_a_size_are_no_outliers",
        "tests/faults/test_updates.py::test_an_ample_norm_changes_no_bit",
        "tests/faults/test_clients.py::test_a_striker_among_enough_others_costs_its_own_updates",
    }
    assert len(tests) > 25
    assert tests - set(NAMED) == checks
