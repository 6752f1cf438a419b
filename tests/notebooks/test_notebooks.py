"""The notebooks are stripped, equal to their scripts, use public names alone, and run to their end in fresh kernels."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "notebooks"
NAMES = sorted(file.stem for file in FOLDER.glob("*.ipynb"))
OURS = ("fedcl", "strategies", "clients")
SECONDS = 1200  # ten times what notebooks/README.md says

nbformat: Any = pytest.importorskip("nbformat", reason="needs the extra dev")
jupytext: Any = pytest.importorskip("jupytext", reason="needs the extra dev")


def _notebook(name: str) -> Any:
    return nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)


def _code(name: str) -> Iterator[ast.Module]:
    """Yield the Python of each cell, and of each module that a cell writes."""
    for cell in _notebook(name).cells:
        if cell.cell_type == "code":
            tree = ast.parse(re.sub(r"^%.*$", "", cell.source, flags=re.MULTILINE))
            yield tree
            for node in ast.walk(tree):
                if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "write":
                    file, text = (ast.literal_eval(word) for word in node.args)
                    if file.endswith(".py"):
                        yield ast.parse(text)


def _private(tree: ast.Module) -> Iterator[str]:
    """Yield what a cell uses of fedcl that is not meant for users, or is not there."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] in OURS)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in OURS:
            module = importlib.import_module(str(node.module))
            public = getattr(module, "__all__", [name for name in dir(module) if not name.startswith("_")])
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                is_module = hasattr(module, "__path__") and importlib.util.find_spec(full) is not None
                if alias.name.startswith("_") or not (alias.name in public or is_module):
                    yield full
            if "._" in str(node.module):
                yield str(node.module)
        elif isinstance(node, ast.Attribute):
            if node.attr.startswith("_"):
                yield node.attr
            elif isinstance(node.value, ast.Name) and node.value.id == "figures":
                figures = importlib.import_module("fedcl.results.figures")
                yield from () if node.attr in figures.__all__ else (f"figures.{node.attr}",)


def test_each_has_its_script_and_is_in_the_index() -> None:
    assert len(NAMES) >= 6
    assert sorted(file.stem for file in FOLDER.glob("*.py")) == NAMES
    index = (FOLDER / "README.md").read_text()
    assert [name for name in NAMES if f"({name}.ipynb)" not in index] == []


@pytest.mark.parametrize("name", NAMES)
def test_it_is_stripped(name: str) -> None:
    notebook = _notebook(name)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert code
    assert [cell.source for cell in code if cell.outputs or cell.execution_count is not None] == []


@pytest.mark.parametrize("name", NAMES)
def test_it_is_the_same_as_its_script(name: str) -> None:
    notebook, script = _notebook(name), jupytext.read(FOLDER / f"{name}.py")
    assert [(cell.cell_type, cell.source) for cell in notebook.cells] == [
        (cell.cell_type, cell.source) for cell in script.cells
    ]
    assert notebook.metadata["jupytext"]["formats"] == "ipynb,py:percent"
    assert script.metadata["jupytext"]["formats"] == "ipynb,py:percent"
    assert notebook.metadata["kernelspec"]["name"] == "python3"


@pytest.mark.parametrize("name", NAMES)
def test_it_uses_public_names_alone(name: str) -> None:
    found = [private for tree in _code(name) for private in _private(tree)]
    assert found == []


def test_a_private_name_would_be_found() -> None:
    cells = "from fedcl.results.run import _table\nfrom fedcl.results import figures\nfigures.no_such(run._rows)"
    assert sorted(_private(ast.parse(cells))) == ["_rows", "fedcl.results.run._table", "figures.no_such"]


@pytest.mark.parametrize("name", NAMES)
def test_links_lead_somewhere(name: str) -> None:
    text = "\n".join(cell.source for cell in _notebook(name).cells if cell.cell_type == "markdown")
    targets = re.findall(r"\]\((?!https?://|#)([^)#\s]+)", text)
    pages = re.findall(r"`(docs/[\w/.]+\.md)`", text)
    assert [target for target in targets if not (FOLDER / target).exists()] == []
    assert [page for page in pages if not (FOLDER.parent / page).exists()] == []


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.timeout(SECONDS)
@pytest.mark.parametrize("name", NAMES)
def test_it_runs_from_any_folder(name: str, tmp_path: Path) -> None:
    nbclient = pytest.importorskip("nbclient", reason="needs the extra dev")
    pytest.importorskip("ipykernel", reason="needs the extra dev")
    notebook = _notebook(name)
    # a user's own start-up files would run in the kernel
    environment = {**os.environ, "IPYTHONDIR": str(tmp_path / "ipython"), "MPLCONFIGDIR": str(tmp_path / "matplotlib")}
    where = {"metadata": {"path": str(tmp_path)}}
    client = nbclient.NotebookClient(notebook, timeout=SECONDS, kernel_name="python3", resources=where)
    client.execute(env=environment)
    drawn = [cell for cell in notebook.cells if cell.cell_type == "code" and cell.source.startswith("figures.")]
    assert drawn
    for cell in drawn:
        shown = [output for output in cell.outputs if "image/png" in output.get("data", {})]
        assert shown, f"a notebook shows no picture of: {cell.source}"
    left = {file.name for file in tmp_path.iterdir()} - {"ipython", "matplotlib"}
    assert left == set(), "runs belong into the temporary folder"
