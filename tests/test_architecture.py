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

CORE = ("fedcl.data", "fedcl.scenario", "fedcl.models", "fedcl.evaluation")
CONTRACTS = ("fedcl.server", "fedcl.client", "fedcl.results", "fedcl.messages")
METHODS = ("strategies", "clients")
CONFIG = (
    "fedcl.config",
    "fedcl.layers",
    "fedcl.overrides",
    "fedcl.sweep.expansion",
    "fedcl.cli",
    "fedcl.server_app",
    "fedcl.client_app",
)
SUPERLINK = ("fedcl.deploy.superlink", "fedcl.deploy.gate", "fedcl.deploy.bundle")
APPS = ("fedcl.server_app", "fedcl.client_app")
# What wires a run, and therefore may see everything but methods.
OUTER = (
    *CONFIG,
    "fedcl.cautions",
    "fedcl.prepared",
    "fedcl.commands",
    "fedcl.sweep",
    "fedcl.extend",
    "fedcl.export",
    "fedcl.play",
    "fedcl.experiment",
    "fedcl.forget",
    "fedcl.launches",
    "fedcl.served",
    "fedcl.verify",
    "fedcl.protocol",
    "fedcl.replay",
    "fedcl.tuning",
    "fedcl.panel",
    "fedcl.wiring",
    "fedcl.bench",
    "fedcl.deploy",
    "fedcl.simulation",
    "fedcl.__main__",
)
# Leaves at the top of fedcl without a package of their own: every layer may use them, they use no layer.
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


def leaves() -> tuple[str, ...]:
    return tuple(
        f"fedcl.{file.stem}"
        for file in (ROOT / "fedcl").glob("*.py")
        if not within(f"fedcl.{file.stem}", (*OUTER, *CONTRACTS)) and file.stem != "__init__"
    )


def forbidden(module: str, imported: str, top: bool) -> str | None:
    """Say why `module` may not import `imported`; None if it may."""
    library = imported.split(".")[0]
    rules = {
        "ray": ("fedcl.simulation",),
        "flwr": ("fedcl.messages", "fedcl.server", "fedcl.simulation", *APPS, "fedcl.bench.flower_app", *SUPERLINK),
        "hydra": CONFIG,
        "omegaconf": CONFIG,
        "matplotlib": ("fedcl.results",),
    }
    if library in rules and not within(module, rules[library]):
        return f"only {', '.join(rules[library])} import {library}"
    if within(module, CORE):
        ours = {"torch", "numpy", "fedcl", "__future__", *sys.stdlib_module_names}
        if library not in ours and (top or library not in SOURCE_LIBRARIES):
            return "the core imports torch, numpy and the standard library; a source's library inside its function"
    if library not in PACKAGES or imported == "fedcl":
        return None
    if within(module, ("fedcl",)) and within(imported, METHODS):
        return "fedcl knows no method by name"
    if within(module, METHODS):
        if within(imported, METHODS) and imported.split(".")[0] != module.split(".")[0]:
            return "strategies and clients never import each other"
        return "methods see the contracts only" if within(imported, OUTER) else None
    if within(module, CORE) and not within(imported, (*CORE, *leaves())):
        return "the core imports nothing above it"
    if within(module, CONTRACTS) and within(imported, OUTER):
        return "the contracts import nothing above them"
    if within(module, leaves()) and not within(imported, (*CORE, *leaves())):
        return "a leaf imports no layer above the core"
    return None


def test_there_is_something_to_check() -> None:
    assert {package_of(file).split(".")[0] for file in FILES} == set(PACKAGES)


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
        ("fedcl.experiment", "from clients.learners import er"),
        ("fedcl.experiment", "import omegaconf"),
        ("fedcl.simulation.grid", "import matplotlib.pyplot"),
        ("strategies.projection.fot", "from clients import learners"),
        ("strategies.projection.fot", "from flwr.app import Message"),
        ("clients.learners.er", "import fedcl.config"),
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
        ("fedcl.config", "import hydra"),
        ("strategies.projection.fot", "import torch\nfrom fedcl.server.contracts import Update"),
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
        "import sys\nimport fedcl.config\n"
        "fedcl.config.list_choices('backend')\n"
        "print(sorted({m.split('.')[0] for m in sys.modules} & {'torch', 'ray', 'flwr'}))"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.skipif(not (ROOT / "fedcl/client_app.py").exists(), reason="there is no fedcl/client_app.py yet")
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
