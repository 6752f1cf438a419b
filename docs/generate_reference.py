"""Pages that the code already holds: every setting of `configs/`, and every word of the command line.

`pages` returns them as Markdown; `docs/site_hooks.py` adds them to the site. Nothing of them is committed, so they
cannot fall behind. Needs PyYAML alone: neither Hydra nor torch is imported.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[1]

_LONGEST = 240  # characters that a default may have; beyond, the table could not be read
_HIDDEN = ("_allowed_", "_target_", "defaults")
_PACKAGE = re.compile(r"#\s*@package\s+(\S+)")
_KINDS = {"bool": "bool", "int": "int", "float": "number", "str": "str", "seq": "a list", "map": "a mapping"}
# Where a group is explained as a whole.
_EXPLAINED = {
    "backend": "cluster.md",
    "data": "data.md",
    "devices": "devices.md",
    "learner": "learners.md",
    "model": "models.md",
    "protocol": "metrics.md",
    "scenario": "scenarios.md",
    "strategy/staleness": "methods/staleness.md",
    "strategy/optimizer": "methods/server_optimizers.md",
    "trackers": "run_length.md",
    "unlearner": "unlearning.md",
}


@dataclass(frozen=True)
class Setting:
    """One parameter as its YAML tells it; `rule` is what a value may be, `about` the comment beside or above it."""

    key: str
    default: str
    rule: str
    about: str


@dataclass(frozen=True)
class Choice:
    """One YAML of a group."""

    group: str
    name: str
    about: str
    targets: tuple[str, ...]
    defaults: tuple[str, ...]
    settings: tuple[Setting, ...]
    text: str


def pages(root: Path = ROOT) -> dict[str, str]:
    """Return every generated page: its address below `docs/`, and its Markdown."""
    groups: dict[str, list[Choice]] = {}
    for file in sorted((root / "configs").rglob("*.yaml")):
        if file.parent != root / "configs":
            choice = read_choice(file, root / "configs")
            groups.setdefault(choice.group, []).append(choice)
    made = {f"reference/config/{_file(group)}": _group_page(group, found, root) for group, found in groups.items()}
    made["reference/config/index.md"] = _root_page(root / "configs" / "config.yaml", groups)
    made["reference/cli.md"] = _cli_page()
    return made


def read_choice(file: Path, configs: Path) -> Choice:
    """Read one YAML of a group: what it says of itself, what it builds, and each of its parameters."""
    text = file.read_text(encoding="utf-8")
    lines = text.splitlines()
    group = file.parent.relative_to(configs).as_posix()
    comments, package = [], group.replace("/", ".")
    for line in lines:
        if not line.startswith("#"):
            break
        if found := _PACKAGE.match(line):
            package = found[1]
        else:
            comments.append(line.lstrip("# ").strip())
    node = yaml.compose(text)
    assert isinstance(node, yaml.MappingNode), file
    prefix = "" if package == "_global_" else package
    settings = tuple(_settings(node, lines, prefix))
    return Choice(group, file.stem, " ".join(comments), tuple(_targets(node)), tuple(_defaults(node)), settings, text)


def read_root(file: Path) -> tuple[Setting, ...]:
    """Read the settings that belong to no one choice."""
    text = file.read_text(encoding="utf-8")
    node = yaml.compose(text)
    assert isinstance(node, yaml.MappingNode)
    return tuple(_settings(node, text.splitlines(), ""))


def _settings(node: yaml.MappingNode, lines: list[str], path: str) -> Iterator[Setting]:
    rules = _rules(node)
    for key, value in node.value:
        if key.value in _HIDDEN:
            continue
        place = f"{path}.{key.value}" if path else key.value
        rule = rules.get(key.value)
        if isinstance(value, yaml.MappingNode) and value.value and not value.flow_style and rule is None:
            yield from _settings(value, lines, place)
        else:
            yield Setting(place, _shown(value), rule or _kind(value), _comment(key, value, lines))


def _comment(key: yaml.Node, value: yaml.Node, lines: list[str]) -> str:
    """Return the comment behind a value, or else the one right above its key, where that stands alone."""
    end = value.end_mark
    behind = lines[end.line][end.column :].strip() if end.line < len(lines) else ""
    if behind.startswith("#"):
        return behind.lstrip("# ")
    above: list[str] = []
    at = key.start_mark.line - 1
    while at >= 0 and lines[at].startswith(" " * key.start_mark.column + "#"):
        above.insert(0, lines[at].strip().lstrip("# "))
        at -= 1
    return " ".join(above) if at >= 0 else ""  # at the top of a file it is about the file


def _rules(node: yaml.MappingNode) -> dict[str, str]:
    for key, value in node.value:
        if key.value == "_allowed_":
            return {name.value: _rule(spec) for name, spec in value.value}
    return {}


def _rule(spec: yaml.Node) -> str:
    if isinstance(spec, yaml.SequenceNode):
        return " or ".join(f"`{item.value}`" for item in spec.value)
    return str(spec.value)


def _kind(value: yaml.Node) -> str:
    kind = value.tag.rpartition(":")[2]
    if str(value.value).startswith("${"):
        return "as there"
    return "required" if value.value == "???" else _KINDS.get(kind, "any")


def _shown(value: yaml.Node) -> str:
    if isinstance(value, yaml.ScalarNode):
        return f"`{value.value}`" if value.value else "`''`"
    text = yaml.serialize(value).strip() if not value.value else _flow(value)
    return f"`{text}`" if len(text) <= _LONGEST else f"{len(value.value)} entries, as in the file"


def _flow(value: yaml.Node) -> str:
    if isinstance(value, yaml.SequenceNode):
        return f"[{', '.join(_flow(item) for item in value.value)}]"
    if isinstance(value, yaml.MappingNode):
        return "{" + ", ".join(f"{key.value}: {_flow(item)}" for key, item in value.value) + "}"
    return str(value.value)


def _targets(node: yaml.MappingNode) -> Iterator[str]:
    for key, value in node.value:
        if key.value == "_target_":
            yield value.value
        elif isinstance(value, yaml.MappingNode):
            yield from _targets(value)


def _defaults(node: yaml.MappingNode) -> Iterator[str]:
    for key, value in node.value:
        if key.value == "defaults":
            for entry in value.value:
                if isinstance(entry, yaml.MappingNode):
                    for group, choice in entry.value:
                        yield f"{group.value.removeprefix('override ').lstrip('/')}={_flow(choice)}"


def _file(group: str) -> str:
    return group.replace("/", "_") + ".md"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


def _code(text: str) -> str:
    """Return a cell in code font; a bar would end the cell even there."""
    return text.replace("|", "\\|")


def _table(settings: tuple[Setting, ...]) -> list[str]:
    if not settings:
        return ["No parameters.", ""]
    rows = ["| key | default | allowed | |", "|---|---|---|---|"]
    rows += [f"| `{s.key}` | {_code(s.default)} | {_code(s.rule)} | {_cell(s.about)} |" for s in settings]
    return [*rows, ""]


def _group_page(group: str, choices: list[Choice], root: Path) -> str:
    lines = [f"# `{group}`", ""]
    if group in _EXPLAINED:
        page = root / "docs" / _EXPLAINED[group]
        title = page.read_text(encoding="utf-8").splitlines()[0].lstrip("# ")
        lines += [f"Explained in [{title}](../../{_EXPLAINED[group]})."]
    lines += [f"Chosen by `{group}=NAME`; `fedcl list {group}` prints the names.", ""]
    lines += ["| choice | |", "|---|---|"]
    lines += [f"| [`{c.name}`](#{c.name}) | {_cell(c.about)} |" for c in choices]
    lines.append("")
    for choice in choices:
        lines += [f"## `{choice.name}` {{ #{choice.name} }}", "", choice.about, ""]
        lines += _facts(choice, root)
        # An experiment's own text is shorter than a table of what it sets.
        lines += ["```yaml", choice.text.rstrip(), "```", ""] if group == "experiment" else _table(choice.settings)
    return "\n".join(lines)


def _facts(choice: Choice, root: Path) -> list[str]:
    lines = [f"- file `configs/{choice.group}/{choice.name}.yaml`"]
    if choice.targets:
        lines.append(f"- builds {', '.join(f'`{target}`' for target in choice.targets)}")
    if choice.defaults:
        lines.append(f"- chooses {', '.join(f'`{text}`' for text in choice.defaults)}")
    if page := _method_page(choice, root):
        lines.append(f"- method: [{page}](../../methods/{page})")
    return [*lines, ""]


def _method_page(choice: Choice, root: Path) -> str | None:
    """Return the page in `docs/methods` that is called as the choice, or is the first to tell how it is chosen."""
    folder = root / "docs" / "methods"
    said = re.compile(rf"{re.escape(choice.group)}={re.escape(choice.name)}(?![\w.])")
    for page in sorted(folder.glob("*.md")):
        if page.stem == choice.name:
            return page.name
    for page in sorted(folder.glob("*.md")):
        if said.search("\n".join(page.read_text(encoding="utf-8").splitlines()[:8])):
            return page.name
    return None


def _root_page(file: Path, groups: dict[str, list[Choice]]) -> str:
    settings = read_root(file)
    node = yaml.compose(file.read_text(encoding="utf-8"))
    assert isinstance(node, yaml.MappingNode)
    chosen = dict(text.split("=", 1) for text in _defaults(node))
    for group, name in list(chosen.items()):  # a choice may choose within groups below it
        for choice in groups.get(group, []):
            if choice.name == name:
                chosen |= {f"{group}/{text.partition('=')[0]}": text.partition("=")[2] for text in choice.defaults}
    lines = [
        "# Configuration",
        "",
        "Written from the YAML files in `configs/` when this site is built. A choice is `group=name`, a setting",
        "`key=value`. A value against *allowed* is refused in one line, before anything runs; without a rule of its",
        "own a value must be of its default's kind. `${...}` is the value of another key.",
        "",
        "## Groups",
        "",
        "| group | default | choices |",
        "|---|---|---|",
    ]
    for group, choices in groups.items():
        names = ", ".join(f"`{choice.name}`" for choice in choices)
        lines.append(f"| [`{group}`]({_file(group)}) | `{chosen.get(group, '')}` | {names} |".replace("``", ""))
    lines += ["", "## Settings that belong to no one choice", ""]
    heads: dict[str, list[Setting]] = {}
    for setting in settings:
        head = setting.key.split(".")[0] if "." in setting.key else ""
        heads.setdefault(head, []).append(setting)
    for head, found in heads.items():
        lines += [*([f"### `{head}`", ""] if head else []), *_table(tuple(found))]
    return "\n".join(lines)


def _cli_page() -> str:
    from fedcl.cli import _parser

    parser = _parser()
    lines = ["# Command line", "", "What `--help` prints, for each command.", ""]
    for name, command in _commands(parser, "fedcl"):
        lines += [f"## {name}", "", "```text", _help(command), "```", ""]
    return "\n".join(lines)


def _help(parser: argparse.ArgumentParser) -> str:
    parser.formatter_class = lambda prog: argparse.RawDescriptionHelpFormatter(prog, width=100)
    return parser.format_help().rstrip()


def _commands(parser: argparse.ArgumentParser, name: str) -> Iterator[tuple[str, argparse.ArgumentParser]]:
    yield name, parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for word, child in action.choices.items():
                yield from _commands(child, f"{name} {word}")
