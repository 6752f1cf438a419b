"""The page's style: no font, image or script from elsewhere."""

from __future__ import annotations

from typing import Final

_LIGHT = """\
--paper: #ffffff; --panel: #f6f7f9; --ink: #222222; --muted: #5f6368; --line: #d5d8dc; --grid: #e3e3e3;
--accent: #005a9c; --good: #00664b; --bad: #a33f00; --keep: 100%;
--c0: #0072b2; --c1: #e69f00; --c2: #009e73; --c3: #d55e00; --c4: #cc79a7; --c5: #56b4e9; --c6: #7a5c00;"""

_DARK = """\
--paper: #15181c; --panel: #1e2227; --ink: #e8eaed; --muted: #a9b0b8; --line: #3a4047; --grid: #30353b;
--accent: #7cc4ff; --good: #5fd3ac; --bad: #ff9b66; --keep: 60%;
--c0: #4aa3df; --c1: #f0b030; --c2: #2fc79a; --c3: #f5813a; --c4: #e39cc4; --c5: #9ad7f7; --c6: #c8ab5a;"""

STYLE: Final = f"""\
:root {{ color-scheme: light dark; {_LIGHT} }}
@media (prefers-color-scheme: dark) {{ :root {{ {_DARK} }} }}
*, *::before, *::after {{ box-sizing: border-box; }}
body {{ margin: 0; background: var(--paper); color: var(--ink); font: 1rem/1.55 system-ui, sans-serif;
  overflow-wrap: anywhere; }}
header, main, footer, nav {{ max-width: 66rem; margin: 0 auto; padding: 0 1rem; }}
header {{ padding-top: 1.5rem; }}
footer {{ padding-bottom: 2rem; color: var(--muted); }}
h1 {{ font-size: 1.6rem; line-height: 1.25; margin: 0 0 .4rem; }}
h2 {{ font-size: 1.25rem; margin: 2.2rem 0 .6rem; padding-bottom: .25rem; border-bottom: 1px solid var(--line); }}
h3 {{ font-size: 1.02rem; margin: 1.4rem 0 .4rem; }}
a {{ color: var(--accent); }}
:focus-visible {{ outline: 3px solid var(--accent); outline-offset: 2px; }}
.skip {{ position: absolute; left: -99rem; }}
.skip:focus {{ left: 1rem; top: .5rem; padding: .4rem .8rem; background: var(--paper); z-index: 1; }}
nav ul {{ display: flex; flex-wrap: wrap; gap: .2rem 1rem; padding: 0; margin: .8rem 0 0; list-style: none; }}
.status {{ display: inline-block; padding: .05rem .6rem; border: 1px solid currentColor; border-radius: 1rem;
  font-weight: 600; }}
.status.done {{ color: var(--good); }}
.status.open {{ color: var(--bad); }}
.note {{ padding: .6rem .9rem; border-left: 4px solid var(--bad); background: var(--panel); }}
.cards {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(9.5rem, 1fr)); gap: .7rem; padding: 0;
  margin: 1rem 0; list-style: none; }}
.cards li {{ background: var(--panel); border: 1px solid var(--line); border-radius: .5rem; padding: .6rem .8rem; }}
.cards strong {{ display: block; font-size: 1.3rem; }}
.cards span {{ display: block; color: var(--muted); font-size: .87rem; }}
.scroll {{ overflow-x: auto; margin: .8rem 0; }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .93rem; overflow-wrap: normal; }}
caption {{ text-align: left; font-weight: 600; padding: .3rem 0; }}
th, td {{ padding: .28rem .7rem; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }}
td, tbody th {{ overflow-wrap: anywhere; max-width: 34rem; }}
td:not(.number) {{ min-width: 8rem; }}
tbody th {{ min-width: 3rem; overflow-wrap: break-word; }}
thead th {{ background: var(--panel); white-space: nowrap; }}
tbody th {{ font-weight: 500; }}
.number {{ text-align: right; white-space: nowrap; }}
th button {{ font: inherit; font-weight: 600; color: inherit; background: none; border: 0; padding: 0;
  cursor: pointer; }}
th button::after {{ content: " \\2195"; color: var(--muted); }}
th[aria-sort="ascending"] button::after {{ content: " \\2191"; }}
th[aria-sort="descending"] button::after {{ content: " \\2193"; }}
pre {{ overflow-x: auto; padding: .7rem .9rem; background: var(--panel); border: 1px solid var(--line);
  border-radius: .4rem; font-size: .9rem; overflow-wrap: normal; }}
.command code {{ user-select: all; }}
.pairs {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(17rem, 1fr)); gap: .2rem 1.5rem; }}
.pairs div {{ display: flex; gap: .6rem; min-width: 0; }}
dt {{ color: var(--muted); flex: 0 0 auto; max-width: 60%; }}
dd {{ margin: 0; min-width: 0; }}
details {{ margin: .8rem 0; }}
summary {{ cursor: pointer; }}
figure {{ margin: 0 0 1.4rem; }}
figure .scroll {{ margin: .2rem 0; }}
figure svg {{ display: block; width: 100%; height: auto; }}
figure svg * {{ stroke-linejoin: round; stroke-linecap: butt; }}
figcaption {{ color: var(--muted); }}
@media (max-width: 30rem) {{
  .pairs {{ grid-template-columns: 1fr; }}
  h1 {{ font-size: 1.3rem; }}
  tbody th {{ max-width: 11rem; }}
}}
@media print {{
  :root {{ color-scheme: light; {_LIGHT} }}
  body {{ font-size: 10pt; }}
  nav, .skip {{ display: none; }}
  header, main, footer {{ max-width: none; padding: 0; }}
  .scroll, pre {{ overflow: visible; white-space: pre-wrap; }}
  figure svg {{ min-width: 0 !important; }}
  figure, .cards li, tr {{ break-inside: avoid; }}
  h2, h3, caption {{ break-after: avoid; }}
  th button::after {{ content: ""; }}
}}
"""

SCRIPT: Final = """\
"use strict";
(function () {
  function key(row, column) {
    var cell = row.cells[column];
    if (cell === undefined || cell.textContent === "") { return null; }
    return cell.dataset.value === undefined ? cell.textContent : Number(cell.dataset.value);
  }
  function compare(a, b) {
    if (typeof a === "number" && typeof b === "number") { return a - b; }
    return String(a).localeCompare(String(b), undefined, { numeric: true });
  }
  function sort(table, column, down) {
    var body = table.tBodies[0];
    var rows = Array.from(body.rows).map(function (row) { return [key(row, column), row]; });
    rows.sort(function (a, b) {
      if (a[0] === null || b[0] === null) { return (a[0] === null) - (b[0] === null); }
      return down ? compare(b[0], a[0]) : compare(a[0], b[0]);
    });
    rows.forEach(function (pair) { body.appendChild(pair[1]); });
  }
  document.querySelectorAll("table.sortable").forEach(function (table) {
    if (table.tBodies[0].rows.length < 2) { return; }
    var heads = Array.from(table.tHead.rows[0].cells);
    heads.forEach(function (head, column) {
      var button = document.createElement("button");
      button.type = "button";
      button.textContent = head.textContent;
      button.title = "sort by this column";
      head.textContent = "";
      head.appendChild(button);
      button.addEventListener("click", function () {
        var down = head.getAttribute("aria-sort") === "ascending";
        heads.forEach(function (other) { other.removeAttribute("aria-sort"); });
        head.setAttribute("aria-sort", down ? "descending" : "ascending");
        sort(table, column, down);
      });
    });
  });
  window.addEventListener("beforeprint", function () {
    document.querySelectorAll("details").forEach(function (one) { one.open = true; });
  });
})();
"""
