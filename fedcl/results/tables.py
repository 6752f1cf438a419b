"""A comparison as text: Markdown, CSV, LaTeX or HTML."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence

from fedcl.results.compare import Cell, Comparison
from fedcl.results.paired import PairedTest

_RATES = ("accuracy/", "forgetting/", "personal/", "stability/", "reference/accuracy/", "reference/forgetting/")
_OTHER_RATES = ("bwt", "fwt", "intransigence")
_SEEDS = 8  # that a note lists
_LATEX = {"\\": r"\textbackslash{}", "_": r"\_", "%": r"\%", "&": r"\&", "#": r"\#", "$": r"\$", "{": r"\{", "}": r"\}",
          "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}  # fmt: skip


def render(comparison: Comparison, form: str) -> str:
    """Return the table as ``markdown``, ``csv``, ``latex`` or ``html``, with what must be known to read it.

    CSV has plain numbers, one line a row and metric; the others show rates in percent.

    Raises
    ------
    ValueError
        For another form.
    """
    if form not in FORMATS:
        raise ValueError(f"--format {form}: must be one of {', '.join(FORMATS)}")
    return FORMATS[form](comparison)


def notes(comparison: Comparison) -> list[str]:
    """Return what a reader of the table must know, a sentence each."""
    told = ["± is half the width of the 95 % t interval over seeds."]
    if len(comparison.rows) > 1:
        told.append(
            f"Differences are from {comparison.rows[comparison.baseline].name}, over the seeds that both have: mean ± "
            "95 % t interval; p of the paired t test, then of the exact sign-flip test, which with n pairs is never "
            "below 2/2^n. Many rows are many tests: the p are not corrected for that."
        )
    told += _unequal(comparison)
    told += [f"Other stream: {line}" for line in comparison.streams]
    told += [f"Left out: {line}" for line in comparison.left_out]
    return told


def _unequal(comparison: Comparison) -> list[str]:
    """Return which rows lack seeds that others have: their means are over other runs."""
    every = sorted({seed for row in comparison.rows for seed in row.seeds})
    lacking = [(row.name, [seed for seed in every if seed not in row.seeds]) for row in comparison.rows]
    said = [f"{name} lacks {_listed(seeds)}" for name, seeds in lacking if seeds]
    if not said:
        return []
    return [f"Unequal seeds: {'; '.join(said)}. Values are over a row's own seeds; to make them even, run those."]


def _listed(seeds: Sequence[int]) -> str:
    shown = ", ".join(map(str, seeds[:_SEEDS]))
    return shown if len(seeds) <= _SEEDS else f"{shown} and {len(seeds) - _SEEDS} more"


def _head(comparison: Comparison) -> list[str]:
    compared = len(comparison.rows) > 1
    head = ["configuration", "seeds"]
    for key in comparison.metrics:
        head += [f"{key} (%)" if is_rate(key) else key, *(["difference"] if compared else [])]
    return head


def _body(comparison: Comparison) -> list[list[str]]:
    compared = len(comparison.rows) > 1
    body = []
    for row in comparison.rows:
        line = [row.name, str(len(row.seeds))]
        for key, cell in zip(comparison.metrics, row.cells, strict=True):
            line += [_value(key, cell), *([_difference(key, cell.test)] if compared else [])]
        body.append(line)
    return body


def is_rate(key: str) -> bool:
    """Whether a metric is a rate, which is shown in percent."""
    return key.startswith(_RATES) or key.removeprefix("reference/") in _OTHER_RATES


def _value(key: str, cell: Cell) -> str:
    if cell.mean is None:
        return ""
    text = _number(key, cell.mean)
    text += "" if cell.half_width is None else f" ± {_number(key, cell.half_width)}"
    return text


def _difference(key: str, test: PairedTest | None) -> str:
    if test is None or test.difference is None:
        return "" if test is None else "no pairs"
    text = _number(key, test.difference, sign="+")
    if test.half_width is None or test.p_t is None:
        return f"{text}; 1 pair, no test"
    exact = "" if test.p_exact is None else f", {_p(test.p_exact)}"
    return f"{text} ± {_number(key, test.half_width)}; p {_p(test.p_t)}{exact}; {test.pairs} pairs"


def _number(key: str, value: float, sign: str = "") -> str:
    return f"{100 * value:{sign}.2f}" if is_rate(key) else f"{value:{sign}.4g}"


def _p(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def _markdown(comparison: Comparison) -> str:
    def escaped(line: Sequence[str]) -> list[str]:
        return [text.replace("|", "\\|") for text in line]

    head, body = escaped(_head(comparison)), [escaped(line) for line in _body(comparison)]
    widths = [max(len(line[i]) for line in (head, *body)) for i in range(len(head))]
    lines = ["| " + " | ".join(map(_justified, line, widths, range(len(line)))) + " |" for line in (head, *body)]
    rule = "|" + "|".join("-" * (w + 2) if i == 0 else "-" * (w + 1) + ":" for i, w in enumerate(widths)) + "|"
    return "\n".join([lines[0], rule, *lines[1:], "", *(f"{note}  " for note in notes(comparison))]).rstrip() + "\n"


def _justified(text: str, width: int, column: int) -> str:
    return text.rjust(width) if column else text.ljust(width)


def _csv(comparison: Comparison) -> str:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    tests = ("pairs", "difference", "difference_half_width", "p_t", "p_exact")
    writer.writerow(("configuration", "metric", "seeds", "mean", "half_width", *tests, "values"))
    for row in comparison.rows:
        for key, cell in zip(comparison.metrics, row.cells, strict=True):
            test = cell.test
            found = (
                (None,) * 5 if test is None else (test.pairs, test.difference, test.half_width, test.p_t, test.p_exact)
            )
            values = " ".join(f"{seed}:{value!r}" for seed, value in cell.values.items())
            writer.writerow((row.name, key, len(cell.values), cell.mean, cell.half_width, *found, values))
    return out.getvalue()


def _latex(comparison: Comparison) -> str:
    def cells(line: Sequence[str]) -> str:
        return " & ".join("".join(_LATEX.get(c, c) for c in text).replace("±", r"$\pm$") for text in line) + r" \\"

    head = _head(comparison)
    told = [f"% {note}" for note in notes(comparison)]
    top = [r"\begin{tabular}{l" + "r" * (len(head) - 1) + "}", r"\toprule", cells(head), r"\midrule"]
    rows = [cells(line).replace("< 0.001", "$<$ 0.001") for line in _body(comparison)]
    return "\n".join(["% needs \\usepackage{booktabs}", *told, *top, *rows, r"\bottomrule", r"\end{tabular}"]) + "\n"


def _html(comparison: Comparison) -> str:
    from fedcl.results.html.page import environment  # with matplotlib, which the other formats need not wait for

    page = environment().get_template("comparison.html")
    return page.render(columns=_head(comparison), rows=_body(comparison), notes=notes(comparison))


FORMATS: dict[str, Callable[[Comparison], str]] = {
    "markdown": _markdown,
    "csv": _csv,
    "latex": _latex,
    "html": _html,
}
