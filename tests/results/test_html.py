"""The report as a file: self-contained, told in words too, and nothing of a run is markup in it."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import pytest

from fedcl.config.compose import compose, to_yaml
from fedcl.contracts.requests import ForgetRequest
from fedcl.results import html
from fedcl.results.html.content import Cell, Table
from fedcl.results.html.page import environment
from fedcl.results.html.svg import inline
from fedcl.results.recorder import Recorder
from fedcl.results.run import load
from fedcl.results.writing import write_launch
from fedcl.unlearning.certificate import About, Receipt, write
from tests.results.rich_run import NAMES, write_run

EVIL = "<script>alert('x')</script>\"><img src=http://evil.example/x onerror=alert(1)>\x00\u202e"
VOID = {"meta", "img", "br", "hr", "input", "link", "col", "wbr"}


class Page(HTMLParser):
    """The elements of a page in order; complains about tags that are not closed in their order."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.text: list[tuple[str, str]] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = [name for name, _ in attrs]
        assert len(names) == len(set(names)), (tag, attrs)
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append((self._open[-1] if self._open else "", data))

    def of(self, *tags: str) -> list[dict[str, str]]:
        return [attributes for tag, attributes in self.elements if tag in tags]


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return the page of a finished run whose every text is hostile."""
    folder = tmp_path_factory.mktemp("runs") / "a&b <i>"
    folder.mkdir()
    write_run(folder, everything=False)
    cfg = compose(["learner=er", "seed=5"])
    recorder = Recorder.__new__(Recorder)
    recorder.run_dir = folder
    env = {"packages": {"fedcl": EVIL}, "git": {"sha": "abc", "dirty": True}}
    launch = {"overrides": ["seed=5", f"name={EVIL}", "run_dir=/old"]}
    write_launch(
        folder, to_yaml({**cfg, "name": EVIL, "data": {"root": EVIL}}), launch["overrides"], {**env, "launch": launch}
    )
    recorder.status("done")
    request = ForgetRequest("bob", "client", clients=(EVIL,))
    receipt = Receipt(
        requests=(request,), first=1, server_round=2, before="0", after="1", model_epoch=1, promise=EVIL, outcomes=(),
        measurements={}, cost={"seconds": 0.5},
    )  # fmt: skip
    write(folder, receipt, About({"name": "a.B", "parameters": {}, "retrains": False}, {}, {}, {}))
    path = html.write(load(folder), defaults=compose([]))
    assert path == folder / "report.html"
    assert path.stat().st_size < 1_500_000
    return path.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(report: str) -> Page:
    return Page(report)


def test_it_names_no_other_address(report: str, page: Page) -> None:
    for tag, attributes in page.elements:
        for name in ("src", "href", "action", "data", "srcset", "poster"):
            value = attributes.get(name, "#")
            assert value.startswith("#") or (tag == "image" and value.startswith("data:image/png;base64,")), (
                tag,
                value,
            )
        assert not any(name.startswith("on") for name in attributes), attributes
    assert not page.of("link", "iframe", "object", "embed", "img", "base")
    styles = " ".join(text for tag, text in page.text if tag == "style")
    assert "url(" not in styles
    assert "@import" not in styles
    assert "xmlns" not in report
    policy = next(meta["content"] for meta in page.of("meta") if "http-equiv" in meta)
    assert policy.startswith("default-src 'none'")


def test_whatever_comes_from_the_run_is_text(report: str, page: Page) -> None:
    assert len(page.of("script")) == 1
    assert not page.of("b", "i")
    words = "".join(text for _, text in page.text)
    assert words.count("<script>alert('x')</script>") >= 5  # title, name, setting, command, certificate
    assert "<script>alert(1)</script>" in words  # the reason of a fault
    assert NAMES[2] in words
    assert "\x00" not in report
    assert "\u202e" not in report


def test_ids_are_unique_and_links_lead_somewhere(page: Page) -> None:
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert [name for name, count in Counter(ids).items() if count > 1] == []
    targets = [attributes["href"][1:] for attributes in page.of("a", "use") if "href" in attributes]
    targets += [attributes["aria-labelledby"] for _, attributes in page.elements if "aria-labelledby" in attributes]
    assert set(targets) <= set(ids)
    assert len(targets) > 20
    assert len(ids) > 40


def test_it_can_be_heard_and_walked_through(page: Page) -> None:
    assert page.of("html")[0]["lang"] == "en"
    for landmark in ("header", "nav", "main", "footer"):
        assert len(page.of(landmark)) == 1
    assert page.elements[[tag for tag, _ in page.elements].index("body") + 1] == (
        "a",
        {"class": "skip", "href": "#main"},
    )
    levels = [int(tag[1]) for tag, _ in page.elements if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    pictures = page.of("svg")
    assert len(pictures) == 6
    for picture in pictures:
        assert picture["role"] == "img"
        assert len(picture["aria-label"]) > 30
    boxes = [attributes for attributes in page.of("div") if attributes.get("class") == "scroll"]
    assert all(box["tabindex"] == "0" and box["aria-label"] and box["role"] == "region" for box in boxes)
    assert len(page.of("caption")) == len(page.of("table")) >= 5
    assert all(attributes["scope"] in ("col", "row") for attributes in page.of("th"))


def test_figures_take_the_pages_colours(page: Page) -> None:
    styles = [attributes.get("style", "") for tag, attributes in page.elements if tag in ("path", "g", "use")]
    used = set(re.findall(r"(?:fill|stroke): ([^;]+)", ";".join(styles)))
    assert {"var(--ink)", "var(--c0)", "var(--muted)"} <= used
    # text on coloured cells keeps its colour; no other is black or white of its own
    assert {value for value in used if value.startswith("#")} <= {"#111111", "#ffffff"}
    page_styles = " ".join(text for tag, text in page.text if tag == "style")
    assert page_styles.count("--ink:") == 2
    assert "prefers-color-scheme: dark" in page_styles
    assert "@media print" in page_styles


def test_it_tells_what_was_run_and_how_to_repeat_it(page: Page) -> None:
    words = "".join(text for _, text in page.text)
    cells = [text for tag, text in page.text if tag in ("td", "th")]
    changed = cells[cells.index("seed") : cells.index("seed") + 3]
    assert changed == ["seed", "5", "0"]
    assert "num_clients" not in cells  # as it is by default
    assert "fedcl run seed=5 'name=<script>" in words
    assert "run_dir=/old" not in words
    assert "had changes that were not committed" in words
    assert "is not finished" not in words


def test_a_run_under_way_says_so_and_an_empty_one_has_a_page(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path)
    recorder.status("running")
    recorder.close(finished=False)
    text = html.write(load(tmp_path)).read_text(encoding="utf-8")
    Page(text)
    assert "This run is not finished" in text
    assert "No accuracy has been measured yet." in text
    assert "14 figures are not drawn" in text


def test_the_reference_stands_beside_the_run(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "reference"):
        folder.mkdir(exist_ok=True)
        with Recorder(folder) as recorder:
            recorder.row(round=0, phase="test", name="accuracy", value=0.5, task=0, after=0, virtual_time=0.0)
            recorder.write_summary({"accuracy/average": 0.5 if folder == tmp_path else 0.375})
    page = Page(html.write(load(tmp_path)).read_text(encoding="utf-8"))
    cells = [text for tag, text in page.text if tag in ("td", "th")]
    row = cells[cells.index("accuracy/average") :][:4]
    assert row == ["accuracy/average", "50.00 %", "37.50 %", "+12.50 pp"]
    assert "reference 37.50 % (+12.50 pp)" in [text for tag, text in page.text if tag == "span"]


def test_templates_escape_and_numbers_are_sorted_by_their_value() -> None:
    show = environment().from_string("{{ text }}")
    assert show.render(text="<&\"'\x07\u2066") == "&lt;&amp;&#34;&#39;\ufffd\ufffd"
    table = environment().from_string('{% from "elements.html" import table %}{{ table(content) }}')
    text = table.render(content=Table("a<b", ("k", "n"), [("x", Cell("12 %", 0.12)), ("y", "")], total=3))
    assert "a&lt;b" in text
    assert '<th scope="col" class="number">n</th>' in text
    assert '<td class="number" data-value="0.12">12 %</td>' in text
    assert "the first 2 of 3" in text
    with pytest.raises(ValueError, match="not an SVG file"):
        inline("<p>", "a")
