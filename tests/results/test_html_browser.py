"""The report in a real Chromium, where one is installed (or named by FEDCL_CHROMIUM)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from fedcl.config.compose import compose
from fedcl.results import html
from fedcl.results.run import load
from tests.results import browser
from tests.results.rich_run import write_run

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(browser.find() is None, reason="no Chromium here, and FEDCL_CHROMIUM names none"),
]

OUTSIDE = """
[...document.querySelectorAll("body *")].filter(one =>
  one.getBoundingClientRect().right > innerWidth + 1 && !one.closest(".scroll, pre, svg, .skip"))
  .map(one => one.outerHTML.slice(0, 80))
"""
COLUMN = """[...document.querySelectorAll("#tables table")[1].tBodies[0].rows].map(row => row.cells[%d].textContent)"""
HEADS = (
    """[...document.querySelectorAll("#tables table")[1].tHead.rows[0].cells].map(c => c.getAttribute("aria-sort"))"""
)
CONTRAST = """
(() => {
  const canvas = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
  const light = (colour) => {
    canvas.fillStyle = colour;
    canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3).map(v => v / 255)
      .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
      .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  };
  const style = getComputedStyle(document.documentElement), back = light(style.getPropertyValue("--paper"));
  const names = ["ink", "muted", "accent", "good", "bad", "c0", "c1", "c2", "c3", "c4", "c5", "c6"];
  return Object.fromEntries(names.map(name => {
    const own = light(style.getPropertyValue("--" + name));
    return [name, (Math.max(own, back) + 0.05) / (Math.min(own, back) + 0.05)];
  }));
})()
"""


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    write_run(folder)
    return html.write(load(folder), defaults=compose([]))


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[browser.Page]:
    program = browser.find()
    assert program is not None
    with browser.page(program, tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [360, 1100])
def test_it_loads_alone_and_fits(page: browser.Page, report: Path, width: int, dark: bool) -> None:
    page.events.clear()
    page.open(report, width=width, dark=dark)
    assert page.run("document.documentElement.scrollWidth <= innerWidth")
    assert page.run(OUTSIDE) == []
    assert page.run("document.querySelectorAll('svg').length") == 14
    assert page.run("[...document.querySelectorAll('svg')].every(one => one.getBoundingClientRect().height > 80)")
    wrong = [event for event in page.events if event["method"] in ("Runtime.exceptionThrown", "Log.entryAdded")]
    wrong += [event for event in page.events if event["method"] == "Runtime.consoleAPICalled"]
    assert wrong == []
    asked = {e["params"]["request"]["url"] for e in page.events if e["method"] == "Network.requestWillBeSent"}
    assert {url for url in asked if not url.startswith("data:image/png")} == {report.as_uri()}
    contrast = page.run(CONTRAST)
    assert {name for name, ratio in contrast.items() if ratio < 4.5 and not name.startswith("c")} == set()
    assert {name for name, ratio in contrast.items() if ratio < 1.9} == set()


def test_a_table_is_sorted_from_the_keyboard(page: browser.Page, report: Path) -> None:
    page.open(report, width=1100)
    before = page.run(COLUMN % 0)
    column = 4  # accuracy of the model that the client would use
    page.run(f"document.querySelectorAll('#tables table')[1].tHead.rows[0].cells[{column}].firstChild.focus()")
    page.press("Enter", 13)
    rising = [float(text) for text in page.run(COLUMN % column)]
    assert rising == sorted(rising)
    assert page.run(HEADS)[column] == "ascending"
    page.press("Enter", 13)
    assert [float(text) for text in page.run(COLUMN % column)] == rising[::-1]
    assert page.run(HEADS).count("descending") == 1
    assert sorted(page.run(COLUMN % 0)) == sorted(before)


def test_the_first_tab_skips_to_the_results(page: browser.Page, report: Path) -> None:
    page.open(report, width=360)
    page.press("Tab", 9)
    assert page.run("document.activeElement.className") == "skip"
    assert page.run("document.activeElement.getBoundingClientRect().left >= 0")
    page.press("Enter", 13)
    assert page.run("document.activeElement.id") == "main"


def test_on_paper_everything_is_open_and_light(page: browser.Page, report: Path) -> None:
    page.open(report, width=1100, dark=True)
    page.run("window.dispatchEvent(new Event('beforeprint'))")
    assert page.run("[...document.querySelectorAll('details')].every(one => one.open)")
    page.send("Emulation.setEmulatedMedia", media="print")
    assert page.run("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert page.run("getComputedStyle(document.querySelector('nav')).display") == "none"
    page.send("Emulation.setEmulatedMedia", media="")
