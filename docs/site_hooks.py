"""What the documentation site has beyond the Markdown files in `docs/`; MkDocs calls the functions named `on_...`.

Three kinds of pages are added while the site is built: the reference (`docs/generate_reference.py`), the benchmarks and
the change log as they stand in the repository, and every file of code that a page links to, with an anchor for each
line. Links between all of these are rewritten, so that the same Markdown works in a checkout and on the site.
"""

from __future__ import annotations

import os
import posixpath
import re
import sys
from pathlib import Path
from typing import Any

import generate_reference
from mkdocs.structure.files import File, Files
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import get_lexer_for_filename

ROOT = Path(__file__).resolve().parents[1]
LINK = re.compile(r"(?<=\]\()(?!https?://|#|mailto:)(?P<path>[^)#\s]*)(?P<anchor>#[^)\s]*)?(?=\))")

_PAGES = {"CONTRIBUTING.md": "project/contributing.md", "CHANGELOG.md": "project/changelog.md", "README.md": "index.md"}
_CODE = (".py", ".yaml", ".toml")
_ROLE = re.compile(r":(?:mod|class|func|meth|attr|data|exc):(?=<code)")
_FENCE = re.compile(r"^( *)(```+|~~~+).*?^\1\2\s*$", re.MULTILINE | re.DOTALL)


def address(path: str) -> str:
    """Return where a file of the repository, named from its root, is on the site (as a source below `docs/`)."""
    if path in _PAGES:
        return _PAGES[path]
    if path == "configs/config.yaml":
        return "reference/config/index.md"
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    if path.startswith(("benchmarks/", "notebooks/")) and path.endswith(".md"):
        return path
    return f"source/{path}.md" if path.endswith(_CODE) else f"source/{path}"


def rewrite(markdown: str, path: str) -> str:
    """Return the Markdown of the file at `path` with its links as they must be on the site; code blocks stay."""
    here = posixpath.dirname(address(path))

    def link(match: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(path), match["path"]))
        anchor = match["anchor"] or ""
        if target.endswith(_CODE):
            anchor = re.sub(r"^#L(\d+)$", r"#L-\1", anchor)
        return posixpath.relpath(address(target), here or ".") + anchor

    parts, at = [], 0
    for fence in _FENCE.finditer(markdown):
        parts += [LINK.sub(link, markdown[at : fence.start()]), fence[0]]
        at = fence.end()
    return "".join([*parts, LINK.sub(link, markdown[at:])])


def targets(markdown: str, path: str) -> set[str]:
    """Return the files of the repository that the Markdown links to, named from its root."""
    plain, folder = _FENCE.sub("", markdown), posixpath.dirname(path)
    return {posixpath.normpath(posixpath.join(folder, match["path"])) for match in LINK.finditer(plain)}


def on_config(config: Any) -> Any:
    """Put every method and every benchmark into the navigation, by the name that its page begins with."""
    for section in config["nav"]:
        for name, folder in (("Methods", "docs/methods"), ("Benchmarks", "benchmarks")):
            if name in section:
                pages = sorted(p for p in (ROOT / folder).rglob("*.md") if p.parent != ROOT / "benchmarks")
                titles = {_title(page): address(page.relative_to(ROOT).as_posix()) for page in pages}
                first = {
                    uri for entry in section[name] for uri in ([entry] if isinstance(entry, str) else entry.values())
                }
                section[name] += [{title: uri} for title, uri in sorted(titles.items()) if uri not in first]
    return config


def on_files(files: Files, config: Any) -> Files:
    """Add the generated pages, the benchmarks, and the code that is linked to."""
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))  # the command line's words are read from the checkout, installed or not
    for uri, text in generate_reference.pages(ROOT).items():
        files.append(File.generated(config, uri, content=text))
    told = [*(ROOT / "benchmarks").rglob("*.md"), *(ROOT / "notebooks").glob("*.md")]
    pages = sorted(page.relative_to(ROOT).as_posix() for page in told)
    pages += ["CONTRIBUTING.md", "CHANGELOG.md"]
    for page in pages:
        text = rewrite((ROOT / page).read_text(encoding="utf-8"), page)
        files.append(File.generated(config, address(page), content=text))
    pages += sorted(p.relative_to(ROOT).as_posix() for p in (ROOT / "docs").rglob("*.md"))
    linked = set().union(*(targets((ROOT / page).read_text(encoding="utf-8"), page) for page in pages))
    for target in sorted(linked - set(pages)):
        if (ROOT / target).is_file() and files.get_file_from_path(address(target)) is None:
            files.append(_source(target, config))
    return files


def on_page_markdown(markdown: str, *, page: Any, config: Any, files: Files) -> str:
    """Rewrite the links of a page that lies in `docs/`; generated ones come as they should be."""
    if page.file.generated_by is not None:
        return markdown
    path = os.path.relpath(page.file.abs_src_path, ROOT).replace(os.sep, "/")
    return rewrite(markdown, path)


def on_page_content(html: str, **_: Any) -> str:
    """Take the roles out of docstrings: ``:class:`Phase``` is to be read as a name in code font."""
    return _ROLE.sub("", html)


def _title(page: Path) -> str:
    """Return the first heading, up to its colon: what the navigation has room for."""
    return page.read_text(encoding="utf-8").splitlines()[0].lstrip("# ").partition(":")[0]


def _source(path: str, config: Any) -> File:
    if not path.endswith(_CODE):
        return File.generated(config, address(path), abs_src_path=str(ROOT / path))
    code = (ROOT / path).read_text(encoding="utf-8")
    form = HtmlFormatter(linenos="inline", lineanchors="L", anchorlinenos=True, cssclass="highlight")
    body = highlight(code, get_lexer_for_filename(path), form)
    page = f"---\nsearch:\n  exclude: true\n---\n# `{path}`\n\n{body}\n"
    return File.generated(config, address(path), content=page)
