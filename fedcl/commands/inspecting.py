"""The commands that inspect: report, compare, export, verify, list, bench."""

from __future__ import annotations

import argparse
import shutil
import sys
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

from fedcl.commands.folders import FAILED, add_trust, file_to_write, run_folder, trust_of

if TYPE_CHECKING:
    from fedcl.commands import Commands


_COMPARE_EXAMPLES = """\
Runs that differ only in their seed are one row. docs/compare.md defines the numbers.

examples:
  fedcl compare runs/sweep
  fedcl compare runs/a runs/b --metric accuracy/average --metric bytes/up --baseline learner=finetune
  fedcl compare runs/sweep --format latex --out table.tex
"""


def add(commands: Commands, configs: argparse.ArgumentParser) -> None:
    """Add these commands."""
    about = "check a run's unlearning certificates"
    verify = commands.add_parser("verify", help=about, parents=[configs])
    verify.add_argument("run_dir", type=Path, metavar="RUN_DIR")
    verify.add_argument(
        "--no-replay", action="store_true", help="do not train the retrained references of exact unlearning"
    )
    add_trust(verify)
    verify.set_defaults(command=_verify)

    told = "print a run's results, draw its figures, write its report.html"
    report = commands.add_parser("report", help=told, parents=[configs])
    report.add_argument("run_dir", type=Path, metavar="RUN_DIR")
    report.set_defaults(command=_report)

    _add_compare(commands)

    about = "write a run's model, or a client's own, to one safetensors file"
    export = commands.add_parser("export", help=about, parents=[configs])
    export.add_argument("run_dir", type=Path, metavar="RUN_DIR")
    export.add_argument("--client", metavar="ID", help="the model that this client predicts with")
    export.add_argument("--out", type=Path, metavar="FILE", help="default: model.safetensors in the run's folder")
    add_trust(export)
    export.set_defaults(command=_export)

    choices = commands.add_parser("list", help="list the available choices", parents=[configs])
    choices.add_argument("kind", nargs="?", metavar="KIND", help="such as learner, scenario, strategy/projection")
    choices.set_defaults(command=_list)

    bench = commands.add_parser("bench", help="measure fedcl itself on this machine")
    bench.add_argument(
        "bench", metavar="NAME", help="engine, flower, gpu, hetero, learners, overhead, pfl, repro, scale or server"
    )
    bench.add_argument(
        "--model", metavar="MODEL", help="mlp, logistic, lenet or resnet8; for benchmarks that train a model"
    )
    bench.add_argument("--python", type=Path, metavar="FILE", help="for pfl: an interpreter with pfl installed")
    bench.add_argument("--json", type=Path, metavar="FILE", help="also write the result to this file")
    bench.set_defaults(command=_bench, config_dir=[])


def _add_compare(commands: Commands) -> None:
    raw = argparse.RawDescriptionHelpFormatter
    compare = commands.add_parser(
        "compare",
        help="a table of several runs, with intervals and tests",
        epilog=_COMPARE_EXAMPLES,
        formatter_class=raw,
    )
    compare.add_argument("places", nargs="+", type=Path, metavar="RUN", help="a run's folder, or one with runs in it")
    compare.add_argument(
        "--metric", action="append", default=[], metavar="KEY", help="of summary.json; may be repeated"
    )
    compare.add_argument("--baseline", metavar="ROW", help="a run's folder or a row's settings; the first row")
    compare.add_argument("--format", default="markdown", choices=("markdown", "csv", "latex", "html"))
    compare.add_argument("--out", type=Path, metavar="FILE", help="write the table to this file instead of printing it")
    compare.add_argument("--force", action="store_true", help="even if the runs' streams differ")
    compare.set_defaults(command=_compare, config_dir=[])


def _verify(args: argparse.Namespace) -> None:
    run_dir = run_folder(args.run_dir)
    from fedcl.runs.verify import verify

    if not verify(run_dir, retrain=not args.no_replay, trust=trust_of(args)):
        raise SystemExit(FAILED)


def _report(args: argparse.Namespace) -> None:
    run_dir = run_folder(args.run_dir)
    from fedcl import results
    from fedcl.config.compose import compose
    from fedcl.results import html
    from fedcl.results.report import terminal_report

    run = results.load(run_dir)
    unwritten: OSError | None = None
    try:
        page = html.write(run, defaults=compose([]), kinds=("png",))
    except OSError as error:  # the numbers can be told all the same
        unwritten = error
    width = min(shutil.get_terminal_size((100, 24)).columns, 120)
    print(terminal_report(run, width=width, color=sys.stdout.isatty()), end="")
    if unwritten is not None:
        raise unwritten
    print(f"report: {page}")


def _compare(args: argparse.Namespace) -> None:
    from fedcl.base.files import write_atomic
    from fedcl.results.compare import compare
    from fedcl.results.tables import render

    comparison = compare(args.places, metrics=args.metric, baseline=args.baseline, force=args.force)
    text = render(comparison, args.format)
    if args.out is None:
        print(text, end="")
        return
    write_atomic(file_to_write(args.out), text)
    print(args.out)


def _export(args: argparse.Namespace) -> None:
    run_dir = run_folder(args.run_dir)
    out = None if args.out is None else file_to_write(args.out)
    from fedcl.runs.export import export

    print(export(run_dir, args.client, out, trust_of(args)))


def _list(args: argparse.Namespace) -> None:
    from fedcl.config.compose import kinds, list_choices

    dirs = args.config_dir
    if args.kind is None:
        rows = [(kind, ", ".join(name for name, _ in list_choices(kind, dirs))) for kind in kinds(dirs)]
    else:
        rows = list_choices(args.kind, dirs)
    width = max((len(name) for name, _ in rows), default=0)
    # in a terminal what is too long goes on below its own column; elsewhere a line stays one
    room = max(shutil.get_terminal_size().columns - width - 2, 20) if sys.stdout.isatty() else sys.maxsize
    for name, text in rows:
        first, *rest = textwrap.wrap(text, room, break_on_hyphens=False) or [""]
        print("\n".join([f"{name:<{width}}  {first}".rstrip(), *(" " * (width + 2) + line for line in rest)]))


def _bench(args: argparse.Namespace) -> None:
    from fedcl.bench import bench

    if not bench(args.bench, args.json, model=args.model, python=args.python).passed:
        raise SystemExit(FAILED)
