"""The commands that run experiments: run, sweep, resume, extend, forget."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from fedcl.commands.folders import FAILED, add_trust, run_folder, trust_of
from fedcl.config.value_rules import ConfigError

if TYPE_CHECKING:
    from fedcl.commands import Commands

_RUN_EXAMPLES = """\
A setting is key=value, a choice is group=name. Several learners can be combined: learner=[ewc,er].

examples:
  fedcl run num_clients=50 clients_per_round=10 rounds_per_task=20 client.epochs=2
  fedcl run strategy/collaboration=fedavg strategy/projection=none compare_with=null
  fedcl run backend=inline run_dir=runs/first
  fedcl run --config-dir my learner=mine        my/learner/mine.yaml; its module is in the current directory,
                                                in my/ or next to it
"""

_SWEEP_EXAMPLES = """\
A list of values without brackets is a sweep; in brackets it is one value: learner=[ewc,er] is one learner.
The same line again skips finished runs and continues with the rest. See docs/sweeps.md.

examples:
  fedcl sweep seed=0,1,2 learner=finetune,er strategy/projection=none,fot
  fedcl sweep 'seed=range(0,5)' 'client.optimizer.lr=choice(0.1,0.3)' sweep_dir=runs/lr --jobs 2
  fedcl sweep sweep_dir=runs/lr                 continue that sweep
"""


def add(commands: Commands, configs: argparse.ArgumentParser, quiet: argparse.ArgumentParser) -> None:
    """Add these commands."""
    raw = argparse.RawDescriptionHelpFormatter
    run = commands.add_parser(
        "run", help="run an experiment", parents=[configs, quiet], epilog=_RUN_EXAMPLES, formatter_class=raw
    )
    run.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="a setting or a choice")
    run.set_defaults(command=_run)

    _add_sweep(commands, configs, quiet)

    resume = commands.add_parser("resume", help="resume an interrupted run", parents=[configs, quiet])
    resume.add_argument("run_dir", type=Path, metavar="RUN_DIR")
    resume.add_argument("--force", action="store_true", help="even if the code or the settings have changed")
    add_trust(resume)
    resume.set_defaults(command=_resume)

    extend = commands.add_parser(
        "extend",
        help="continue a finished run with more tasks or rounds, in a new folder",
        parents=[configs, quiet],
    )
    extend.add_argument("run_dir", type=Path, metavar="RUN_DIR")
    extend.add_argument("--force", action="store_true", help="even if the code or the settings have changed")
    extend.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="rounds_per_task, scenario.*, run_dir")
    add_trust(extend)
    extend.set_defaults(command=_extend)

    _add_forget(commands, configs, quiet)


def _add_sweep(commands: Commands, configs: argparse.ArgumentParser, quiet: argparse.ArgumentParser) -> None:
    sweep = commands.add_parser(
        "sweep",
        help="run every combination of several settings",
        parents=[configs, quiet],
        epilog=_SWEEP_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    sweep.add_argument("overrides", nargs="*", metavar="KEY=VALUE,VALUE", help="as for fedcl run; and sweep_dir=DIR")
    add_trust(sweep)
    sweep.add_argument("--jobs", type=_positive, default=1, metavar="N", help="number of runs at once; 1")
    sweep.set_defaults(command=_sweep)


def _add_forget(commands: Commands, configs: argparse.ArgumentParser, quiet: argparse.ArgumentParser) -> None:
    forget = commands.add_parser(
        "forget", help="request that a run forgets a client, a class, samples or a task", parents=[configs, quiet]
    )
    forget.add_argument("run_dir", type=Path, metavar="RUN_DIR")
    forget.add_argument(
        "--client",
        action="append",
        default=[],
        metavar="ID",
        help="a departing client; with --class, --samples or --task: only its data",
    )
    forget.add_argument("--class", action="append", dest="classes", default=[], type=int, metavar="LABEL")
    forget.add_argument("--samples", default=[], type=_ints, metavar="POSITIONS", help="such as 1,5,9")
    forget.add_argument("--task", action="append", default=[], type=int, metavar="NUMBER")
    forget.add_argument("--id", metavar="NAME", help="the request's name, on its certificate")
    forget.add_argument("--unlearner", metavar="NAME", help="another unlearner than the run's; for a finished run")
    forget.add_argument("--force", action="store_true", help="even if the code or the settings have changed")
    forget.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="a setting of that unlearner")
    add_trust(forget)
    forget.set_defaults(command=_forget)


def _run(args: argparse.Namespace) -> None:
    from fedcl.config.compose import compose

    cfg = compose(args.overrides, args.config_dir)
    from fedcl.runs import experiment, two_phase

    run_one = experiment.run if cfg["protocol"]["name"] == "none" else two_phase.two_phase
    print(run_one(cfg, args.overrides, args.config_dir, args.quiet), flush=True)


def _sweep(args: argparse.Namespace) -> None:
    from fedcl.sweep import sweep

    folder, unfinished = sweep(args.overrides, args.config_dir, jobs=args.jobs, quiet=args.quiet, trust=args.trust)
    if not args.quiet:
        from fedcl.results.compare import compare
        from fedcl.results.tables import render

        try:
            print(render(compare([folder]), "markdown"))
        except ConfigError as error:  # all failed, or their streams differ
            print(f"no table: {error}")
    for entry in unfinished:
        print(f"fedcl: {entry.status}: {entry.name}: {entry.error}", file=sys.stderr)
    if unfinished:
        logs = f"{folder / 'logs'} has all that they printed"
        print(f"fedcl: {logs}; to try again: fedcl sweep sweep_dir={folder}", file=sys.stderr)
    print(folder, flush=True)
    if unfinished:
        raise SystemExit(FAILED)


def _resume(args: argparse.Namespace) -> None:
    run_dir = run_folder(args.run_dir)
    from fedcl.runs import experiment

    print(experiment.resume(run_dir, args.force, args.quiet, trust=trust_of(args)), flush=True)


def _extend(args: argparse.Namespace) -> None:
    run_dir = run_folder(args.run_dir)
    from fedcl.runs.extend import extend

    print(extend(run_dir, args.overrides, force=args.force, quiet=args.quiet, trust=trust_of(args)), flush=True)


def _forget(args: argparse.Namespace) -> None:
    run_dir = run_folder(args.run_dir)
    from fedcl.runs.forget import Asked, forget

    chosen = [] if args.unlearner is None else [f"unlearner={args.unlearner}"]
    lists = (tuple(args.client), tuple(args.classes), tuple(args.samples), tuple(args.task))
    asked, overrides = Asked(*lists, id=args.id), [*chosen, *args.overrides]
    how = {"force": args.force, "quiet": args.quiet, "trust": trust_of(args)}
    print("\n".join(forget(run_dir, asked, overrides, **how)), flush=True)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}: must be a whole number >= 1")
    return int(text)


def _ints(text: str) -> list[int]:
    parts = text.split(",")
    if not all(part.strip().isdecimal() for part in parts):
        raise argparse.ArgumentTypeError(f"{text}: must be whole numbers apart by commas, such as 1,5,9")
    return [int(part) for part in parts]
