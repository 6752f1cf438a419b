"""``fedcl deploy``: its command line. The code behind an action is imported when the action is called."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fedcl.deploy.layout import CONTROL_PORT, PORT, Fleet

_EXAMPLES = """\
examples:
  fedcl deploy local -n 3 learner=er            server and three devices on this machine, with TLS and keys
  fedcl deploy init fleet --devices 3 --address 192.168.1.10
  fedcl deploy check fleet
  fedcl deploy register fleet                   which devices the running server admits
  fedcl deploy run fleet data/partition=local rounds_per_task=5
  fedcl deploy resume fleet
"""
_NOT_BEGUN = "the run had not started"
_LOUD = """\
*******************************************************************************
*  --insecure: NO TLS AND NO AUTHENTICATION. Whoever is in this network can   *
*  read every model and every message, and join in as a device.               *
*******************************************************************************"""


def add(commands: Any, parents: list[argparse.ArgumentParser], configs: argparse.ArgumentParser) -> None:
    """Add ``deploy`` and its actions to the command line; ``configs`` adds the user's own configuration folders."""
    raw = argparse.RawDescriptionHelpFormatter
    deploy = commands.add_parser("deploy", help="run on real devices", epilog=_EXAMPLES, formatter_class=raw)
    actions = deploy.add_subparsers(dest="action", required=True, metavar="ACTION")

    _add_init(actions)

    check = actions.add_parser("check", help="check a fleet's folder, or a device's, for problems")
    check.add_argument("folder", type=Path, metavar="DIR")
    check.set_defaults(command=_check)

    register = actions.add_parser("register", help="list the devices that the running server admits")
    register.add_argument("folder", type=Path, metavar="DIR")
    register.set_defaults(command=_register)

    run = actions.add_parser("run", help="run an experiment on the devices", parents=[configs, *parents])
    run.add_argument("folder", type=Path, metavar="DIR")
    run.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="as for fedcl run")
    run.set_defaults(command=_run)

    resume = actions.add_parser("resume", help="resume an interrupted run", parents=[configs, *parents])
    resume.add_argument("folder", type=Path, metavar="DIR")
    resume.add_argument("run_dir", type=Path, nargs="?", metavar="RUN_DIR", help="the run; default: the last")
    resume.set_defaults(command=_resume)
    _add_local(actions, [configs, *parents])
    for action in (check, register):
        action.set_defaults(config_dir=[])


def _add_init(actions: Any) -> None:
    init = actions.add_parser("init", help="create the folder of a small fleet")
    init.add_argument("folder", type=Path, metavar="DIR")
    init.add_argument("--devices", type=int, default=3, metavar="N", help="number of devices; 3")
    init.add_argument(
        "--address", help="name or IP address at which devices reach the server; default: this machine only"
    )
    init.add_argument("--port", type=int, default=PORT, help=f"the port for devices; {PORT}")
    init.add_argument("--control-port", type=int, default=CONTROL_PORT, help=f"for this machine alone; {CONTROL_PORT}")
    init.add_argument("--own-certificates", action="store_true", help="create no certificates; you add your own")
    init.add_argument("--insecure", action="store_true", help="without TLS and authentication: never outside a lab")
    init.set_defaults(command=_init, config_dir=[])


def _add_local(actions: Any, parents: list[argparse.ArgumentParser]) -> None:
    about = "server and devices on this machine, for one run"
    local = actions.add_parser("local", help=about, parents=parents)
    local.add_argument("-n", "--devices", type=int, default=3, metavar="N", help="number of devices; 3")
    local.add_argument("--dir", dest="folder", type=Path, metavar="DIR", help="keep the fleet's folder in DIR")
    local.add_argument("--resume", action="store_true", help="resume the last run of the fleet in --dir")
    local.add_argument("--insecure", action="store_true", help="without TLS and authentication")
    local.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="as for fedcl run")
    local.set_defaults(command=_local)


def _init(args: argparse.Namespace) -> None:
    from fedcl.deploy.init import init

    if args.insecure:
        print(_LOUD, file=sys.stderr)
    fleet = init(
        args.folder,
        devices=args.devices,
        address=args.address or "127.0.0.1",
        port=args.port,
        control_port=args.control_port,
        insecure=args.insecure,
        own_certificates=args.own_certificates,
    )
    if args.own_certificates and not args.insecure:
        print(f"put ca.crt, server.crt and server.key into {fleet.server}, and ca.crt into each device's folder")
    if args.address is None:
        print("without --address only this machine can reach the server; devices elsewhere need its name or address")
    print("next:")
    for command in (fleet.server / "start.sh", fleet.device(fleet.devices[0]) / "start.sh"):
        print(f"  {shlex.quote(str(command))}")
    print(f"  fedcl deploy run {shlex.quote(str(fleet.folder))}")
    print(fleet.folder)


def _check(args: argparse.Namespace) -> None:
    from fedcl.deploy.check import check

    findings = check(args.folder)
    for finding in findings:
        print(f"{'WRONG' if finding.wrong else 'ok':<6}{finding.text}")
    if any(finding.wrong for finding in findings):
        raise SystemExit(1)


def _register(args: argparse.Namespace) -> None:
    from fedcl.deploy.gate import read_keys
    from fedcl.deploy.submit import refuse_unreachable

    fleet = _load(args.folder)
    refuse_unreachable(fleet)
    if fleet.insecure:
        print("any device may join")
        return
    clients = sorted(read_keys(fleet.server / "keys").values())
    print(f"{len(clients)} devices may join: {', '.join(clients)}")


def _run(args: argparse.Namespace) -> None:
    from fedcl.deploy.submit import submit

    fleet = _load(args.folder)
    with _resumable(f"fedcl deploy resume {_named(args.config_dir)}{{fleet}}"):
        run_dir = submit(fleet, args.overrides, quiet=args.quiet, config_dirs=args.config_dir)
    _finalize(run_dir, args.quiet)


def _resume(args: argparse.Namespace) -> None:
    from fedcl.deploy.submit import resume

    fleet = _load(args.folder)
    with _resumable(f"fedcl deploy resume {_named(args.config_dir)}{{fleet}}"):
        run_dir = resume(fleet, args.run_dir, quiet=args.quiet, config_dirs=args.config_dir)
    _finalize(run_dir, args.quiet)


def _local(args: argparse.Namespace) -> None:
    from fedcl.deploy.local import local

    if args.insecure:
        print(_LOUD, file=sys.stderr)
    how = {"folder": args.folder, "insecure": args.insecure, "quiet": args.quiet, "config_dirs": args.config_dir}
    with _resumable(f"fedcl deploy local -n {args.devices} --resume {_named(args.config_dir)}--dir {{fleet}}"):
        run_dir = local(args.devices, args.overrides, going_on=args.resume, **how)
    _finalize(run_dir, args.quiet)


def _named(config_dirs: Sequence[Path]) -> str:
    return (
        "".join(f"--config-dir {shlex.quote(str(folder))} " for folder in config_dirs)
        .replace("{", "{{")
        .replace("}", "}}")
    )


@contextmanager
def _resumable(command: str) -> Iterator[None]:
    """After a signal, print the command that resumes the run."""
    from fedcl.deploy.submit import Stopped, settle

    try:
        yield
    except KeyboardInterrupt as stop:
        raise KeyboardInterrupt(_NOT_BEGUN) from stop
    except Stopped as stop:
        begun = settle(stop.run_dir)
        text = command.format(fleet=shlex.quote(str(stop.fleet)))
        hint = f"resume with: {text}" if begun else _NOT_BEGUN
        if isinstance(stop.cause, KeyboardInterrupt):
            raise KeyboardInterrupt(hint) from stop
        print(f"fedcl: terminated; {hint}", file=sys.stderr)
        raise stop.cause from stop


def _load(folder: Path) -> Fleet:
    fleet = Fleet.load(folder)
    if fleet.insecure:
        print(_LOUD, file=sys.stderr)
    return fleet


def _finalize(run_dir: Path, quiet: bool) -> None:
    """Print what a simulation prints at its end."""
    if not quiet:
        from fedcl import results
        from fedcl.results.report import terminal_report

        print(terminal_report(results.load(run_dir)))
    print(run_dir, flush=True)
