"""The documentation site: its generated pages tell what the YAMLs say, no page is left out, and it builds."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
YAMLS = sorted(path for path in (ROOT / "configs").rglob("*.yaml") if path.parent != ROOT / "configs")


@pytest.fixture(scope="module")
def reference() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate_reference", ROOT / "docs" / "generate_reference.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def pages(reference: ModuleType) -> dict[str, str]:
    made: dict[str, str] = reference.pages(ROOT)
    return made


def leaves(node: dict[str, Any]) -> set[str]:
    """Return the last words of all keys that hold a value, read by a YAML loader instead of from the text."""
    names = set()
    for key, value in node.items():
        if key not in ("_allowed_", "_target_", "defaults"):
            whole = not isinstance(value, dict) or not value or key in node.get("_allowed_", {})
            names |= {key} if whole else leaves(value)
    return names


def test_every_parameter_of_every_choice_is_told(reference: ModuleType) -> None:
    for file in YAMLS:
        choice = reference.read_choice(file, ROOT / "configs")
        keys = [setting.key for setting in choice.settings]
        assert len(set(keys)) == len(keys), file
        assert {key.split(".")[-1] for key in keys} >= leaves(yaml.safe_load(file.read_text()) or {}), file
        assert choice.about, f"{file}: the reference shows its first comment"


def test_a_setting_has_its_key_default_rule_and_comment(reference: ModuleType, tmp_path: Path) -> None:
    folder = tmp_path / "strategy" / "projection"
    folder.mkdir(parents=True)
    (folder / "mine.yaml").write_text(
        "# What it is.\n# More of it.\ndefaults:\n  - other: one\nserver:\n  _target_: mine.Mine\n"
        "  rate: 0.5  # how much\n  # said above\n  mode: fast\n  many: [1, {a: 2}]\n  free: true\n"
        "  _allowed_:\n    rate: number in (0, 1]\n    mode: [fast, slow]\n"
    )
    choice = reference.read_choice(folder / "mine.yaml", tmp_path)
    assert (choice.group, choice.name, choice.about) == ("strategy/projection", "mine", "What it is. More of it.")
    assert (choice.targets, choice.defaults) == (("mine.Mine",), ("other=one",))
    told = [(setting.key, setting.default, setting.rule, setting.about) for setting in choice.settings]
    assert told == [
        ("strategy.projection.server.rate", "`0.5`", "number in (0, 1]", "how much"),
        ("strategy.projection.server.mode", "`fast`", "`fast` or `slow`", "said above"),
        ("strategy.projection.server.many", "`[1, {a: 2}]`", "a list", ""),
        ("strategy.projection.server.free", "`true`", "bool", ""),
    ]


def test_the_root_tells_what_is_chosen_by_default(pages: dict[str, str]) -> None:
    page = pages["reference/config/index.md"]
    assert re.search(r"\[`strategy/projection`\]\(strategy_projection.md\) \| `fot` \|", page)
    assert re.search(r"`client.batch_size` \| `20` \| int >= 1 \|", page)


def test_the_command_line_page_has_every_command(pages: dict[str, str]) -> None:
    page = pages["reference/cli.md"]
    for command in ("run", "sweep", "resume", "forget", "compare", "deploy local"):
        assert f"## fedcl {command}\n" in page


def test_no_page_is_left_out() -> None:
    nav = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").split("\nnav:", 1)[1]
    index = (ROOT / "docs" / "methods" / "index.md").read_text(encoding="utf-8")
    for page in (ROOT / "docs").rglob("*.md"):
        uri = page.relative_to(ROOT / "docs").as_posix()
        if uri.startswith("methods/") and page.stem != "index":
            assert f"]({page.name})" in index, f"docs/methods/index.md lacks {page.name}"
        else:
            assert uri in nav, f"mkdocs.yml lacks {uri}"


def test_every_group_has_its_place_in_the_navigation(pages: dict[str, str]) -> None:
    nav = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").split("\nnav:", 1)[1]
    for uri in pages:
        assert uri in nav, f"mkdocs.yml lacks {uri}"


def test_every_choice_of_a_method_is_on_a_page_of_its_own() -> None:
    index = (ROOT / "docs" / "methods" / "index.md").read_text(encoding="utf-8")
    for kind, free in (("learner", {"finetune"}), ("unlearner", set())):
        for file in (ROOT / "configs" / kind).glob("*.yaml"):
            assert file.stem in free or f"`{file.stem}`" in index, f"docs/methods/index.md lacks {kind}={file.stem}"


def mkdocs() -> list[str]:
    """Return the command that is MkDocs: this interpreter's, or another environment's on the path."""
    if all(importlib.util.find_spec(name) for name in ("mkdocs", "material", "mkdocstrings")):
        return [sys.executable, "-m", "mkdocs"]
    program = shutil.which("mkdocs")
    if program is None:
        pytest.skip("no mkdocs here nor on the path: pip install '.[docs]'")
    return [program]


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_it_builds_without_a_warning_and_loads_nothing_from_elsewhere(tmp_path: Path) -> None:
    env = {**os.environ, "NO_MKDOCS_2_WARNING": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    command = [*mkdocs(), "build", "--strict", "-d", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    loaded = re.compile(
        r"""<(?:script|img|iframe|source)\b[^>]*\bsrc=["']?(?:https?:)?//|<link\b[^>]*stylesheet[^>]*//"""
    )
    pages = list((tmp_path / "site").rglob("*.html"))
    assert len(pages) > 100
    for page in pages:
        assert not loaded.search(page.read_text(encoding="utf-8")), page
