"""The command line: it parses the arguments, runs a command (`fedcl.commands`) and sets the exit status.

Exit status: 0 done, 1 failed, 2 bad input (one line on stderr, nothing written), 130 interrupted, 143 terminated;
141 if nobody reads the output any more.
"""

from __future__ import annotations

import argparse
import errno
import io
import os
import select
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from fedcl import __version__
from fedcl.commands import add as add_commands
from fedcl.config.own_code import add_plugin_paths
from fedcl.config.rule_kinds import is_unicode
from fedcl.config.value_rules import ConfigError, RunFailed
from fedcl.deploy.commands import add as add_deploy

OK, FAILED, BAD_INPUT, INTERRUPTED, NOBODY_READS, TERMINATED = 0, 1, 2, 130, 141, 143

_SIM_PACKAGES = ("ray", "pandas", "pyarrow", "matplotlib", "sklearn", "scipy", "jinja2", "rich", "yaml", "PIL")

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_COPY, _REMOVE = "copy the folder to a place that you can write to", "something else is in its place; remove it"
_UNFIT = {
    errno.EROFS: _COPY, errno.EACCES: _COPY, errno.EPERM: _COPY, errno.EISDIR: _REMOVE, errno.EEXIST: _REMOVE,
    errno.ENOTDIR: _REMOVE, errno.ENOTEMPTY: _REMOVE, errno.ELOOP: _REMOVE, errno.ENOENT: "restore it",
    errno.ENAMETOOLONG: "choose a shorter name",
}  # fmt: skip

_ABOUT = "Federated continual learning with unlearning and late clients: simulate, inspect, deploy."

_EXAMPLES = """\
examples:
  fedcl run                                     the built-in digits, five tasks, FOT against plain averaging
  fedcl run learner=er strategy/projection=none seed=1
  fedcl list learner                            the available learners
  fedcl report runs/NAME                        tables and figures of a finished run
  fedcl sweep seed=0,1,2 learner=finetune,er    several runs and a table of the results
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status; `argv` defaults to the process's arguments."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal may lack characters that names have
            stream.reconfigure(errors="backslashreplace")
    warnings.formatwarning = _format_warning
    words = sys.argv[1:] if argv is None else argv
    for text in (*words, os.getcwd()):
        if not is_unicode(text):
            print(f"fedcl: error: {text!a}: must be UTF-8 text; rename it", file=sys.stderr)
            return BAD_INPUT
    try:
        args = _parse(words)
    except SystemExit as stop:  # argparse has printed help or an error
        return stop.code if isinstance(stop.code, int) else BAD_INPUT
    add_plugin_paths(args.config_dir, outside=_given_folders(args))
    try:
        with _terminating():
            args.command(args)
            sys.stdout.flush()
    except ConfigError as error:
        print(f"fedcl: error: {error}", file=sys.stderr)
        return BAD_INPUT
    except RunFailed as error:
        print(f"fedcl: error: {error}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt as stop:
        print("; ".join(["fedcl: interrupted", *map(str, stop.args)]), file=sys.stderr)
        return INTERRUPTED
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else FAILED
    except Exception as error:
        return _status_of(error)
    return OK


def _status_of(error: Exception) -> int:
    """Print an error in one line if it is a known one, otherwise its traceback; return the exit status."""
    if isinstance(error, ModuleNotFoundError) and (error.name or "").split(".")[0] in _SIM_PACKAGES:
        print(f"fedcl: error: needs the package '{error.name}'; pip install 'fedcl[sim]'", file=sys.stderr)
        return FAILED
    if isinstance(error, BrokenPipeError) and _nobody_reads():
        return NOBODY_READS
    if isinstance(error, OSError) and error.errno in _NO_ROOM:
        print(
            f"fedcl: error: {error.strerror}; free some space, then resume with: fedcl resume RUN_DIR", file=sys.stderr
        )
        return FAILED
    if isinstance(error, OSError) and error.errno in _UNFIT and error.filename is not None:
        print(f"fedcl: error: {error.filename}: {error.strerror}; {_UNFIT[error.errno]}", file=sys.stderr)
        return BAD_INPUT
    traceback.print_exception(error)
    return FAILED


def _format_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    """Return a warning as one line; where in the code it came from is for those who ask for errors (`-W error`)."""
    return f"fedcl: warning: {' '.join(str(message).split())}\n"


def _given_folders(args: argparse.Namespace) -> list[Path]:
    """Return the folders that a command is to work on: what lies in them is data, also for who stands there."""
    named = [getattr(args, "run_dir", None), *getattr(args, "places", [])]
    named += [text.partition("=")[2].strip("'\"") for text in getattr(args, "overrides", []) if "sweep_dir=" in text]
    return [Path(folder) for folder in named if folder]


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = _parser()
    args, rest = parser.parse_known_args(argv)
    # argparse takes positionals in one go; a setting may also stand after an option.
    takes_settings = args.name in ("run", "sweep", "extend", "forget")
    takes_settings |= args.name == "deploy" and args.action in ("run", "local")
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

    add_commands(commands, configs, quiet)
    add_deploy(commands, [quiet], configs)
    return parser


def _nobody_reads() -> bool:
    """Whether the program that read our output has gone, as `| head` does; what is left of it goes nowhere then."""
    output = sys.stdout.fileno()
    poll = select.poll()
    poll.register(output, 0)
    gone = any(event & select.POLLERR for _, event in poll.poll(0))
    if gone:
        os.dup2(os.open(os.devnull, os.O_WRONLY), output)
    return gone


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
