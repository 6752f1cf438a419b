from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("fedcl", "strategies", "clients")
FILES = sorted(file for package in PACKAGES for file in (ROOT / package).rglob("*.py"))

# One ordered list: each place imports only places before it, and those on its own line.
LAYERS: tuple[tuple[str, ...], ...] = (
    ("fedcl.base",),
    ("fedcl.config",),
    ("fedcl.data", "fedcl.models"),
    ("fedcl.scenario", "fedcl.evaluation"),
    ("fedcl.contracts", "fedcl.messages"),
    ("fedcl.client",),
    ("fedcl.server",),
    ("fedcl.unlearning",),
    ("fedcl.results",),
    ("fedcl.assembly",),
    ("fedcl.simulation",),
    ("fedcl.deploy",),
    ("fedcl.runs",),
    ("fedcl.sweep", "fedcl.bench"),
    ("fedcl.commands", "fedcl.cli", "fedcl.server_app", "fedcl.client_app", "fedcl.__main__"),
)
METHODS = ("strategies", "clients")
# what methods build on
LIBRARIES = (
    *("fedcl.base", "fedcl.data", "fedcl.models", "fedcl.scenario", "fedcl.evaluation", "fedcl.contracts"),
    *("fedcl.client", "fedcl.server"),
)
APPS = ("fedcl.server_app", "fedcl.client_app")
# who may import a library: everybody else asks them
GUARDED = {
    "ray": ("fedcl.simulation",),
    "flwr": ("fedcl.messages", "fedcl.server", "fedcl.simulation", "fedcl.deploy", *APPS, "fedcl.bench.flower_app"),
    "hydra": ("fedcl.config", "fedcl.sweep", "fedcl.cli", *APPS),
    "omegaconf": ("fedcl.config", "fedcl.sweep", "fedcl.cli", *APPS),
    "matplotlib": ("fedcl.results",),
}
# rooms of torch, numpy and the standard library; the library that a source or metric is named for, in its function
PLAIN = ("fedcl.base", "fedcl.data", "fedcl.models", "fedcl.scenario", "fedcl.evaluation", "fedcl.contracts")
SOURCE_LIBRARIES = {"sklearn", "scipy", "pandas", "pyarrow", "PIL", "datasets", "flwr_datasets", "safetensors"}


def within(module: str, places: tuple[str, ...]) -> bool:
    return any(module == place or module.startswith(place + ".") for place in places)


def module_name(file: Path) -> str:
    parts = list(file.relative_to(ROOT).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def package_of(file: Path) -> str:
    return ".".join(file.relative_to(ROOT).parent.parts)


def imports_of(source: str, package: str) -> list[tuple[str, bool]]:
    """Every imported module, with whether it is imported at module level; `from a import b` counts as a and a.b."""
    found: list[tuple[str, bool]] = []

    def visit(node: ast.AST, top: bool) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                found.extend((alias.name, top) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                base = child.module or ""
                if child.level:
                    parts = package.split(".")
                    base = ".".join([*parts[: len(parts) - child.level + 1], *([base] if base else [])])
                found.append((base, top))
                found.extend((f"{base}.{alias.name}", top) for alias in child.names)
            visit(child, top and not isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)))

    visit(ast.parse(source), True)
    return found


def layer(module: str) -> int:
    """Return the place of `module` in the list; -1 for the package itself, which everybody may import."""
    found = [at for at, places in enumerate(LAYERS) if within(module, places)]
    return found[0] if found else -1


def forbidden(module: str, imported: str, top: bool) -> str | None:
    """Say why `module` may not import `imported`; None if it may."""
    library = imported.split(".")[0]
    if library in GUARDED and not within(module, GUARDED[library]):
        return f"only {', '.join(GUARDED[library])} import {library}"
    if within(module, PLAIN):
        ours = {"torch", "numpy", "fedcl", "__future__", *sys.stdlib_module_names}
        if library not in ours and (top or library not in SOURCE_LIBRARIES):
            return "this room imports torch, numpy and the standard library; a source's library inside its function"
    if library not in PACKAGES:
        return None
    if within(module, METHODS):
        if within(imported, METHODS):
            return None if library == module.split(".")[0] else "strategies and clients never import each other"
        allowed = within(imported, LIBRARIES) or imported == "fedcl"
        return None if allowed else "methods see the contracts, the rooms below them, and the libraries of both sides"
    if within(imported, METHODS):
        return "fedcl knows no method by name"
    return f"{module} stands below {imported}" if layer(imported) > layer(module) else None


def test_there_is_something_to_check() -> None:
    assert {package_of(file).split(".")[0] for file in FILES} == set(PACKAGES)


def test_every_module_has_a_room() -> None:
    homeless = [module_name(file) for file in FILES if file.parts[len(ROOT.parts)] == "fedcl"]
    assert [name for name in homeless if name != "fedcl" and layer(name) < 0] == []
    rooms = {place for places in LAYERS for place in places}
    assert {name for name in rooms if not (ROOT / name.replace(".", "/")).exists()} == {
        name for name in rooms if (ROOT / (name.replace(".", "/") + ".py")).exists()
    }


@pytest.mark.parametrize("file", FILES, ids=lambda file: module_name(file))
def test_imports_go_one_way(file: Path) -> None:
    module = module_name(file)
    wrong = [
        f"{module} imports {imported}: {why}"
        for imported, top in imports_of(file.read_text(encoding="utf-8"), package_of(file))
        if (why := forbidden(module, imported, top))
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("fedcl.data.sources", "def f():\n    import ray"),
        ("fedcl.data.sources", "import sklearn"),
        ("fedcl.data.sources", "from fedcl import server"),
        ("fedcl.data.sources", "from ..client import loop"),
        ("fedcl.models.flat", "import hydra"),
        ("fedcl.client.loop", "import flwr"),
        ("fedcl.server.strategy", "import strategies.projection.fot"),
        ("fedcl.server.strategy", "from fedcl.simulation import grid"),
        ("fedcl.runs.experiment", "from clients.learners import er"),
        ("fedcl.runs.experiment", "import omegaconf"),
        ("fedcl.simulation.grid", "import matplotlib.pyplot"),
        ("fedcl.contracts.strategy", "from fedcl.client.loop import fit"),
        ("fedcl.server.loop", "from fedcl.unlearning.service import Unlearning"),
        ("strategies.projection.fot", "from fedcl.runs import session"),
        ("strategies.projection.fot", "from clients import learners"),
        ("strategies.projection.fot", "from flwr.app import Message"),
        ("clients.learners.er", "import fedcl.config.compose"),
    ],
)
def test_the_walk_sees_a_wrong_import(module: str, source: str) -> None:
    package = module.rpartition(".")[0]
    assert any(forbidden(module, imported, top) for imported, top in imports_of(source, package))


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("fedcl.data.sources", "def f():\n    from sklearn.datasets import load_digits"),
        ("fedcl.server.strategy", "from fedcl.models.flat import FlatSpec\nimport flwr"),
        ("fedcl.simulation.grid", "import ray\nfrom fedcl.client import loop"),
        ("fedcl.config.compose", "import hydra"),
        ("strategies.projection.fot", "import torch\nfrom fedcl.contracts.strategy import Update"),
    ],
)
def test_the_walk_lets_right_imports_pass(module: str, source: str) -> None:
    package = module.rpartition(".")[0]
    assert not [i for i, top in imports_of(source, package) if forbidden(module, i, top)]


def test_results_package_loads_without_matplotlib() -> None:
    source = (ROOT / "fedcl/results/__init__.py").read_text(encoding="utf-8")
    assert not [name for name, _ in imports_of(source, "fedcl.results") if name.split(".")[0] == "matplotlib"]


@pytest.mark.parametrize("file", FILES, ids=lambda file: module_name(file))
def test_files_are_short_and_names_say_something(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    assert text.count("\n") <= 500
    empty = ("manager", "handler", "helper", "utils")
    tree = ast.parse(text)
    defined = [n.name for n in ast.walk(tree) if isinstance(n, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))]
    names = [file.stem, *defined]
    assert not [name for name in names if any(word in name.lower() for word in empty)]


def python(code: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=env, check=False, timeout=120
    )


def test_help_imports_nothing_heavy() -> None:
    done = python(
        "import sys\nfrom fedcl.cli import main\nassert main(['--help']) == 0\n"
        "print(sorted({m.split('.')[0] for m in sys.modules} & {'torch', 'ray', 'flwr', 'hydra', 'numpy', 'pandas'}))"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"


def test_reading_a_configuration_imports_no_torch() -> None:
    done = python(
        "import sys\nimport fedcl.config.compose\n"
        "fedcl.config.compose.list_choices('backend')\n"
        "print(sorted({m.split('.')[0] for m in sys.modules} & {'torch', 'ray', 'flwr'}))"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"


def test_a_device_needs_no_simulation_package() -> None:
    done = python(
        "import sys\n"
        "for name in ('ray', 'matplotlib', 'pandas', 'pyarrow', 'sklearn'):\n"
        "    sys.modules[name] = None\n"
        "import fedcl.client_app\n"
        "print(type(fedcl.client_app.app).__name__)"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "ClientApp"
