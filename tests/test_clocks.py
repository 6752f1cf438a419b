"""No test is decided by how long something took: machines differ, and other processes take their share.

A clock may say when to stop waiting, in a loop that looks again and again; a bound that must hold is such a limit, or a
timeout, ten times as long as it takes. What is fast is shown by a benchmark.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent
FILES = sorted(TESTS.rglob("*.py"))
CLOCKS = {"time", "perf_counter", "monotonic", "process_time", "thread_time"}
CLOCKS |= {f"{name}_ns" for name in CLOCKS}


def clock_names(tree: ast.AST) -> set[str]:
    """Return the names by which clocks are called without their module: `from time import perf_counter as now`."""
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module == "time"]
    return {name.asname or name.name for node in imports for name in node.names if name.name in CLOCKS}


def reads_clock(node: ast.AST, bare: set[str]) -> bool:
    """Whether ``node`` is the call of a clock: ``time.monotonic()``, or one of the ``bare`` names."""
    if not isinstance(node, ast.Call):
        return False
    if isinstance(node.func, ast.Name):
        return node.func.id in bare
    called = node.func
    return isinstance(called, ast.Attribute) and isinstance(called.value, ast.Name) and called.value.id == "time" and (
        called.attr in CLOCKS
    )  # fmt: skip


def timed(source: str) -> Iterator[str]:
    """Yield where ``source`` measures a time, or holds a clock against a limit outside of a loop that waits."""
    tree = ast.parse(source)
    bare = clock_names(tree)
    noted = {
        target.id
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign) and any(reads_clock(part, bare) for part in ast.walk(node.value))
        for target in node.targets
        if isinstance(target, ast.Name)
    }

    def is_time(node: ast.AST) -> bool:
        return reads_clock(node, bare) or (isinstance(node, ast.Name) and node.id in noted)

    def is_number(node: ast.AST) -> bool:  # an hour ago is a moment
        return isinstance(node, ast.Constant)

    def visit(node: ast.AST, waiting: bool) -> Iterator[str]:
        if (
            isinstance(node, ast.BinOp)
            and isinstance(node.op, ast.Sub)
            and is_time(node.left)
            and not is_number(node.right)
        ):
            yield f"line {node.lineno}: {ast.unparse(node)} measures a time"
        if isinstance(node, ast.Compare) and not waiting and any(reads_clock(part, bare) for part in ast.walk(node)):
            yield f"line {node.lineno}: {ast.unparse(node)} asserts a time"
        if (
            isinstance(node, ast.Constant)
            and isinstance(node.value, str)
            and any(name in node.value for name in CLOCKS)
        ):
            yield from (f"line {node.lineno}: in the program, {found}" for found in timed_program(node.value))
        for child in ast.iter_child_nodes(node):
            yield from visit(child, waiting or isinstance(node, ast.While))

    yield from visit(tree, False)


def timed_program(text: str) -> Iterator[str]:
    """Yield the same for a text, where it is a program."""
    try:
        yield from timed(text)
    except SyntaxError:
        return


def test_no_time_is_asserted() -> None:
    assert len(FILES) > 100
    texts = {file.relative_to(TESTS): file.read_text(encoding="utf-8") for file in FILES if file != Path(__file__)}
    found = [f"{name}, {place}" for name, text in texts.items() for place in timed(text)]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "source",
    [
        "started = time.process_time()\nf()\nassert time.process_time() - started < 2.0",
        "a = time.monotonic()\nf()\nb = time.monotonic()\nseconds = b - a",
        "from time import perf_counter as now\nstart = now()\nf()\nassert 0 < now() - start",
        "deadline = time.monotonic() + 5\nf()\nassert time.monotonic() < deadline",
        "assert f() <= time.time() + 1.0",
        "def test(self):\n    took = time.perf_counter() - self.started",
        "PROGRAM = 'import time\\nt = time.time_ns()\\nprint(time.time_ns() - t)'",
    ],
)
def test_an_asserted_time_is_found(source: str) -> None:
    assert list(timed(source))


@pytest.mark.parametrize(
    "source",
    [
        "deadline = time.monotonic() + 60\nwhile not done():\n    assert time.monotonic() < deadline",
        "assert time.time() - 3600",
        "while busy() and time.monotonic() < deadline:\n    pass",
        "record(created_at=time.time())",
        "assert 'the time.monotonic() - started of a sentence'",
    ],
)
def test_a_wait_with_a_limit_is_none(source: str) -> None:
    assert not list(timed(source))
