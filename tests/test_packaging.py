from __future__ import annotations

import io
import os
import re
import shutil
import subprocess
import sys
import tomllib
import venv
import zipfile
from pathlib import Path
from typing import Any

import pytest
from flwr.cli.build import build_fab_from_disk

from fedcl import __version__, cli
from fedcl.config.compose import CONFIG_DIR

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_the_version_is_the_same_everywhere(project: dict[str, Any]) -> None:
    assert project["project"]["version"] == __version__
    assert f"version: {__version__}" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"## [{__version__}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_the_configuration_lies_beside_the_package() -> None:
    assert CONFIG_DIR == ROOT / "configs"
    assert (CONFIG_DIR / "config.yaml").is_file()
    assert not (CONFIG_DIR / "__init__.py").exists()


def test_a_device_installs_few_packages(project: dict[str, Any]) -> None:
    names = {re.split(r"[<>=\[ ]", entry)[0] for entry in project["project"]["dependencies"]}
    assert names == {"flwr", "torch", "numpy", "hydra-core", "omegaconf", "safetensors"}


def test_whichever_package_of_simulations_is_missing_one_line_says_so(project: dict[str, Any]) -> None:
    imported = {"flwr": "ray", "scikit-learn": "sklearn", "pyyaml": "yaml", "pillow": "PIL"}
    names = [re.split(r"[<>=\[ ]", entry)[0] for entry in project["project"]["optional-dependencies"]["sim"]]
    assert {imported.get(name, name) for name in names} == set(cli._SIM_PACKAGES)


def test_every_dependency_has_its_reason(project: dict[str, Any]) -> None:
    reasons = (ROOT / "docs/adr/0001-dependencies.md").read_text(encoding="utf-8")
    extras = project["project"]["optional-dependencies"]
    for entry in [*project["project"]["dependencies"], *extras["sim"], *extras["dev"]]:
        assert f"`{entry}`" in reasons, f"{entry} stands in pyproject.toml without a reason in the ADR"


def test_the_app_bundle_declares_one_override_string(project: dict[str, Any]) -> None:
    app = project["tool"]["flwr"]["app"]
    assert app["config"] == {"overrides": ""}
    assert app["components"] == {"serverapp": "fedcl.server_app:app", "clientapp": "fedcl.client_app:app"}
    # What a bundle always leaves out must not hold code (Flower's own exclusion patterns).
    for package in ("fedcl", "strategies", "clients"):
        paths = [file.relative_to(ROOT) for file in (ROOT / package).rglob("*.py")]
        assert not [p for p in paths if p.name.startswith("test_") or p.stem.endswith("_test")]
        assert not [p for p in paths if {"build", "lib", "lib64", "parts", "eggs"} & set(p.parts)]


def test_a_device_runs_the_client_app_out_of_the_bundle(tmp_path: Path) -> None:
    zipfile.ZipFile(io.BytesIO(build_fab_from_disk(ROOT))).extractall(tmp_path)
    packed = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    assert {"fedcl/client_app.py", "fedcl/server_app.py", "configs/config.yaml", "clients/learners/er.py"} <= packed
    unneeded = ("fedcl/bench/", "fedcl/results/html/", "fedcl/results/figures/", "docs/", "tests/", "notebooks/")
    assert not [name for name in packed if name.startswith(unneeded)]
    code = (
        "import sys\n"
        "for name in ('ray', 'matplotlib', 'pandas', 'pyarrow', 'sklearn', 'scipy', 'jinja2'):\n"
        "    sys.modules[name] = None\n"
        "import fedcl.client_app, fedcl.server_app\n"
        "print(fedcl.client_app.__file__, fedcl.server_app.PAGE)"
    )
    shown = subprocess.check_output(
        [sys.executable, "-c", code], text=True, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(tmp_path)}
    )
    assert shown.splitlines()[-1] == f"{tmp_path / 'fedcl/client_app.py'} ['figures=false']"


def test_readme_and_ci_run_the_same_commands() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    ci = (ROOT / ".ci/run").read_text(encoding="utf-8")
    assert ".venv/bin/pip install -e '.[sim,dev]'" in readme
    assert "/bin/pip install -e '.[sim,dev]'" in ci
    assert "\nsource .venv/bin/activate " in readme
    assert "\npython -m pytest " in readme
    assert "/bin/python -m pytest\n" in ci
    assert (ROOT / ".ci/run").stat().st_mode & 0o111


@pytest.mark.slow
def test_the_wheel_runs_away_from_the_checkout(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name in ("fedcl", "strategies", "clients", "configs"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", str(tmp_path), str(source)]
    subprocess.run(build, check=True, capture_output=True, timeout=240)
    (wheel,) = tmp_path.glob("fedcl-*.whl")
    venv.create(tmp_path / "venv", with_pip=True, symlinks=True)
    python = tmp_path / "venv/bin/python"
    # The dependencies come from this environment; the package itself must come from the wheel.
    packages = Path(
        subprocess.check_output(
            [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], text=True
        ).strip()
    )
    subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-deps", wheel], check=True, timeout=120)
    here = [path for path in sys.path if path.endswith("site-packages")]
    (packages / "dependencies.pth").write_text("\n".join(here))
    helped = subprocess.run(
        [tmp_path / "venv/bin/fedcl", "--help"], capture_output=True, text=True, cwd=tmp_path, check=True
    )
    assert "run an experiment" in helped.stdout
    shown = subprocess.check_output(
        [python, "-c", "import fedcl.config.compose as c; print(c.CONFIG_DIR); c.compose([])"], text=True, cwd=tmp_path
    )
    assert Path(shown.strip()) == packages / "configs"
    templates = {path.name for path in (packages / "fedcl/results/html/templates").iterdir()}
    assert templates == {path.name for path in (ROOT / "fedcl/results/html/templates").iterdir()}
