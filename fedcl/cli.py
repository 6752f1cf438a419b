"""The command line: run, resume, forget, verify, report, list, bench, deploy.

Heavy libraries are imported inside the command that needs them, so that help and mistakes are answered at once.

Exit status: 0 done, 1 failed, 2 bad input (one line on stderr, nothing written), 130 interrupted, 143 terminated.
"""

from __future__ import annotations

import argparse
import errno
import shutil
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from fedcl import __version__
from fedcl.building import plugin_directories
from fedcl.deploy.commands import add as add_deploy
from fedcl.rules import ConfigError

OK, FAILED, BAD_INPUT, INTERRUPTED, TERMINATED = 0, 1, 2, 130, 143

_SIM_PACKAGES = ("ray", "pandas", "pyarrow", "matplotlib", "sklearn", "rich", "yaml")

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

_ABOUT = "Federated continual learning with unlearning and late clients: simulate it, look at it, deploy it."

_EXAMPLES = """\
examples:
  fedcl run                                     the built-in digits, five tasks, FOT against plain averaging
  fedcl run learner=er strategy/projection=none seed=1
  fedcl list learner                            what can be chosen
  fedcl report runs/NAME                        tables and figures of a finished run
"""

_RUN_EXAMPLES = """\
A setting is key=value. A choice is group=name; a learner may be several: learner=[ewc,er].

examples:
  fedcl run num_clients=50 clients_per_round=10 rounds_per_task=20 client.epochs=2
  fedcl run strategy/collaboration=fedavg strategy/projection=none compare_with=null
  fedcl run backend=inline run_dir=runs/first
  fedcl run --config-dir my learner=mine        my/learner/mine.yaml; its module lies in the current directory,
                                                in my/ or beside it
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status; `argv` defaults to the process's arguments."""
    try:
        args = _parse(sys.argv[1:] if argv is None else argv)
    except SystemExit as stop:  # argparse has printed help, or what was wrong
        return stop.code if isinstance(stop.code, int) else BAD_INPUT
    _add_plugin_paths(args.config_dir)
    try:
        with _terminating():
            args.command(args)
    except ConfigError as error:
        print(f"fedcl: error: {error}", file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt:
        print("fedcl: interrupted", file=sys.stderr)
        return INTERRUPTED
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else FAILED
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] not in _SIM_PACKAGES:
            traceback.print_exc()
        else:
            print(f"fedcl: error: needs the package '{error.name}'; pip install 'fedcl[sim]'", file=sys.stderr)
        return FAILED
    except OSError as error:
        if error.errno not in _NO_ROOM:
            traceback.print_exc()
        else:
            print(f"fedcl: error: {error.strerror}; make room, then go on with: fedcl resume RUN_DIR", file=sys.stderr)
        return FAILED
    except Exception:
        traceback.print_exc()
        return FAILED
    return OK


def _run(args: argparse.Namespace) -> None:
    from fedcl.config import compose

    cfg = compose(args.overrides, args.config_dir)
    from fedcl import experiment, protocol

    play = experiment.run if cfg["protocol"]["name"] == "none" else protocol.two_phase
    print(play(cfg, args.overrides, args.config_dir, args.quiet), flush=True)


def _resume(args: argparse.Namespace) -> None:
    run_dir = _run_folder(args.run_dir)
    from fedcl import experiment

    print(experiment.resume(run_dir, args.force, args.quiet), flush=True)


def _forget(args: argparse.Namespace) -> None:
    run_dir = _run_folder(args.run_dir)
    from fedcl.forget import Asked, forget

    chosen = [] if args.unlearner is None else [f"unlearner={args.unlearner}"]
    lists = (tuple(args.client), tuple(args.classes), tuple(args.samples), tuple(args.task))
    asked, overrides = Asked(*lists, id=args.id), [*chosen, *args.overrides]
    print("\n".join(forget(run_dir, asked, overrides, force=args.force, quiet=args.quiet)), flush=True)


def _verify(args: argparse.Namespace) -> None:
    run_dir = _run_folder(args.run_dir)
    from fedcl.verify import verify

    if not verify(run_dir, replay=not args.no_replay):
        raise SystemExit(FAILED)


def _report(args: argparse.Namespace) -> None:
    run_dir = _run_folder(args.run_dir)
    from fedcl import results
    from fedcl.results.figures import save_all
    from fedcl.results.report import terminal_report

    run = results.load(run_dir)
    width = min(shutil.get_terminal_size((100, 24)).columns, 120)
    print(terminal_report(run, width=width, color=sys.stdout.isatty()))
    save_all(run, run_dir / "figures")
    print(f"figures: {run_dir / 'figures'}")


def _list(args: argparse.Namespace) -> None:
    from fedcl.config import kinds, list_choices

    dirs = args.config_dir
    if args.kind is None:
        rows = [(kind, ", ".join(name for name, _ in list_choices(kind, dirs))) for kind in kinds(dirs)]
    else:
        rows = list_choices(args.kind, dirs)
    width = max((len(name) for name, _ in rows), default=0)
    for name, text in rows:
        print(f"{name:<{width}}  {text}".rstrip())


def _bench(args: argparse.Namespace) -> None:
    from fedcl.bench import bench

    if not bench(args.bench, args.json).passed:
        raise SystemExit(FAILED)


def _run_folder(path: Path) -> Path:
    if not (path / "config.yaml").is_file():
        raise ConfigError(f"{path}: not a run's folder; it has no config.yaml")
    return path


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = _parser()
    args, rest = parser.parse_known_args(argv)
    # argparse takes positionals in one go; a setting may also stand after an option.
    takes_settings = args.name in ("run", "forget") or (args.name == "deploy" and args.action in ("run", "local"))
    if rest and (not takes_settings or any(text.startswith("-") for text in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if takes_settings:
        args.overrides = [*args.overrides, *rest]
    return args


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("fedcl", description=_ABOUT, epilog=_EXAMPLES, formatter_class=raw)
    parser.add_argument("--version", action="version", version=f"fedcl {__version__}")
    commands = parser.add_subparsers(dest="name", required=True, metavar="COMMAND")

    configs = argparse.ArgumentParser(add_help=False)
    configs.add_argument(
        "--config-dir",
        action="append",
        default=[],
        type=Path,
        metavar="DIR",
        help="a folder with choices of your own, laid out like configs/; may be given again",
    )
    quiet = argparse.ArgumentParser(add_help=False)
    quiet.add_argument("--quiet", action="store_true", help="print the run's folder and nothing else")

    run = commands.add_parser(
        "run", help="run an experiment", parents=[configs, quiet], epilog=_RUN_EXAMPLES, formatter_class=raw
    )
    run.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="a setting or a choice")
    run.set_defaults(command=_run)

    resume = commands.add_parser("resume", help="go on with an interrupted run", parents=[configs, quiet])
    resume.add_argument("run_dir", type=Path, metavar="RUN_DIR")
    resume.add_argument("--force", action="store_true", help="also if the code or the settings have changed since")
    resume.set_defaults(command=_resume)

    _add_forget(commands, quiet)
    add_deploy(commands, [quiet])
    verify = commands.add_parser("verify", help="check a run's certificates of what was forgotten")
    verify.add_argument("run_dir", type=Path, metavar="RUN_DIR")
    verify.add_argument("--no-replay", action="store_true", help="do not train all over what exact ones claim")
    verify.set_defaults(command=_verify, config_dir=[])

    report = commands.add_parser("report", help="print a run's results and draw its figures", parents=[configs])
    report.add_argument("run_dir", type=Path, metavar="RUN_DIR")
    report.set_defaults(command=_report)

    choices = commands.add_parser("list", help="list what can be chosen", parents=[configs])
    choices.add_argument("kind", nargs="?", metavar="KIND", help="such as learner, scenario, strategy/projection")
    choices.set_defaults(command=_list)

    bench = commands.add_parser("bench", help="measure fedcl itself on this machine")
    bench.add_argument("bench", metavar="NAME", help="repro, server or learners")
    bench.add_argument("--json", type=Path, metavar="FILE", help="also write the result there")
    bench.set_defaults(command=_bench, config_dir=[])
    return parser


def _add_forget(commands: argparse._SubParsersAction[argparse.ArgumentParser], quiet: argparse.ArgumentParser) -> None:
    forget = commands.add_parser(
        "forget", help="ask a run to forget a client, a class, samples or a task", parents=[quiet]
    )
    forget.add_argument("run_dir", type=Path, metavar="RUN_DIR")
    forget.add_argument("--client", action="append", default=[], metavar="ID", help="leaves; or narrows it down")
    forget.add_argument("--class", action="append", dest="classes", default=[], type=int, metavar="LABEL")
    forget.add_argument("--samples", default=[], type=_ints, metavar="POSITIONS", help="such as 1,5,9")
    forget.add_argument("--task", action="append", default=[], type=int, metavar="NUMBER")
    forget.add_argument("--id", metavar="NAME", help="the request's name, on its certificate")
    forget.add_argument("--unlearner", metavar="NAME", help="another one than the run's; for a run that is over")
    forget.add_argument("--force", action="store_true", help="also if the code or the settings have changed since")
    forget.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="a setting of that unlearner")
    forget.set_defaults(command=_forget, config_dir=[])


def _ints(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def _add_plugin_paths(config_dirs: Sequence[Path]) -> None:
    # Appended, never put first: a file of the user's must not shadow an installed module.
    for folder in plugin_directories(config_dirs):
        if str(folder) not in sys.path:
            sys.path.append(str(folder))


@contextmanager
def _terminating() -> Iterator[None]:
    """Let SIGTERM unwind the stack like Ctrl-C does, so that the run can close its files."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may set a signal's handler
        return

    def stop(signum: int, frame: FrameType | None) -> None:
        raise SystemExit(TERMINATED)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
