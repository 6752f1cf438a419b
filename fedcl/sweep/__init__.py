"""Many runs from one line, in one folder: finished ones are skipped, interrupted ones are resumed."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedcl.config.overrides import in_quotes, parse, setting
from fedcl.config.own_code import add_plugin_paths
from fedcl.config.value_rules import ConfigError, parse_rule
from fedcl.results import schema
from fedcl.results.locking import hold
from fedcl.sweep.expansion import Job, expand
from fedcl.sweep.index import Entry, Index
from fedcl.sweep.processes import Jobs

__all__ = ["sweep"]

_ROOT = Path("runs") / "sweep"


def sweep(
    overrides: Sequence[str], config_dirs: Sequence[Path], *, jobs: int, quiet: bool, trust: bool = False
) -> tuple[Path, list[Entry]]:
    """Run every combination of the overrides' values; return the sweep's folder and the jobs that are not done.

    Parameters
    ----------
    overrides
        As for one run, some of them with several values in Hydra's grammar (:func:`fedcl.sweep.expansion.expand`), and
        ``sweep_dir``, the folder: a new one under ``runs/sweep`` without it. In the folder of a sweep these jobs join
        those there; ``sweep_dir`` alone continues them. Jobs get ``compare_with=null`` unless it is set: they are
        compared with each other.
    config_dirs
        Folders with the user's own choices.
    jobs
        How many processes run at once.
    quiet
        Print nothing meanwhile.
    trust
        Also run code that is not fedcl's, from where the folder of a sweep says.

    Raises
    ------
    ConfigError
        If any of the jobs' configurations is wrong; nothing has been written then.
    KeyboardInterrupt, SystemExit
        After a signal; the same line continues where it stopped.
    """
    rest, given = _sweep_dir(overrides)
    folder = given or _new_folder()
    index = Index.read(folder)
    continues = bool(index.entries) and not rest
    if continues and not trust:
        _refuse_foreign_folders(index, config_dirs)
    asked = list(index.entries) if continues else _asked(index, rest, config_dirs)
    todo = [entry for entry in asked if not index.is_done(entry)]
    for text in _check(index, todo, trust=trust or not continues):
        if not quiet:
            print(f"fedcl: {text}", file=sys.stderr)
    _make(folder)
    # its jobs lock it, too, so that one that outlives its sweep is not started a second time
    with hold(folder, "a sweep, or a job of one,") as held:
        index.write()
        tell = _Progress(index, len(asked), len(asked) - len(todo), quiet)
        Jobs(index, jobs, held, tell, ("--trust",) if trust else ()).run(todo)
    return folder, [entry for entry in asked if entry.status != "done"]


def _refuse_foreign_folders(index: Index, config_dirs: Sequence[Path]) -> None:
    """Refuse to continue a sweep whose folder alone says where code may come from."""
    named = tuple(str(Path(folder).resolve()) for folder in config_dirs)
    if index.config_dirs and index.config_dirs != named:
        raise ConfigError(
            f"{index.folder / schema.SWEEP}: its jobs have {_folders(index.config_dirs)}; if you know it, say so on "
            "this line, too, or add --trust"
        )
    if Path.cwd().resolve().is_relative_to(index.folder.resolve()):
        raise ConfigError(f"sweep_dir={index.folder}: continue it from a folder outside of it, or add --trust")


def _asked(index: Index, overrides: Sequence[str], config_dirs: Sequence[Path]) -> list[Entry]:
    resolved = tuple(str(Path(folder).resolve()) for folder in config_dirs)
    if index.entries and index.config_dirs != resolved:
        raise ConfigError(
            f"sweep_dir={index.folder}: its jobs have {_folders(index.config_dirs)}, and new ones must have the same; "
            "choose another sweep_dir"
        )
    index.config_dirs = resolved
    alone = any(text.partition("=")[0] == "compare_with" for text in overrides)
    fixed = [] if alone else ["compare_with=null"]
    return index.add([Job(job.name, (*fixed, *job.overrides)) for job in expand(overrides, config_dirs)])


def _folders(config_dirs: Sequence[str]) -> str:
    return " ".join(f"--config-dir {folder}" for folder in config_dirs) or "no --config-dir"


def _sweep_dir(overrides: Sequence[str]) -> tuple[list[str], Path | None]:
    """Part ``sweep_dir`` from the overrides; ConfigError if they set a job's own folder."""
    rest, folder = [], None
    for text in overrides:
        key = text.partition("=")[0]
        if key == "run_dir":
            raise ConfigError(f"{text}: each job of a sweep has a folder of its own; set sweep_dir, where these are")
        if key == "sweep_dir":
            folder = _named(text)
        else:
            rest.append(text)
    return rest, folder


def _named(text: str) -> Path:
    rule, override = parse_rule("path", "sweep_dir"), parse(text)
    value = None if override.is_sweep_override() else setting(override, text, rule).value
    if not rule.accepts(value):
        raise ConfigError(f"{text}: must be one path; as text, write {in_quotes(text)}")
    return Path(os.path.expandvars(str(value))).expanduser()


def _new_folder() -> Path:
    stem = time.strftime("%Y%m%d-%H%M%S", time.gmtime())
    path, attempt = _ROOT / stem, 1
    while path.exists():
        attempt += 1
        path = _ROOT / f"{stem}-{attempt}"
    return path


def _make(folder: Path) -> None:
    if folder.is_dir() and any(folder.iterdir()) and not (folder / schema.SWEEP).is_file():
        raise ConfigError(
            f"sweep_dir={folder}: holds other files; it must be new, empty, or a sweep's folder with its sweep.json"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"sweep_dir={folder}: cannot be made: {error.strerror}") from error


def _check(index: Index, entries: Sequence[Entry], *, trust: bool) -> list[str]:
    """Compose every configuration, then build what each needs but for another seed, before any job is started.

    Remarks on the configurations are returned, once each.
    """
    from fedcl.config.compose import compose, remarks  # here and below: help must not wait for them
    from fedcl.results.launches import Trust

    dirs = [Path(folder) for folder in index.config_dirs]
    if trust:
        add_plugin_paths(dirs)  # a sweep that continues was not given them
    cfgs, found = [], []
    for entry in entries:
        try:
            cfg = compose(entry.overrides, dirs)
            Trust(tuple(dirs), trust).refuse_foreign(cfg, index.folder)
            found += remarks(entry.overrides, dirs)
        except ConfigError as error:
            raise ConfigError(f"job {entry.name}: {error}") from error
        if cfg["protocol"]["name"] != "none":
            name = cfg["protocol"]["name"]
            raise ConfigError(f"protocol={name}: is many runs of its own, and no job of a sweep; use fedcl run for it")
        cfgs.append((entry, cfg))
    _check_fit(cfgs, dirs)
    return list(dict.fromkeys(found))


def _check_fit(cfgs: Sequence[tuple[Entry, dict[str, Any]]], dirs: Sequence[Path]) -> None:
    from fedcl.runs.experiment import check

    known: set[str] = set()
    source, dataset = None, None
    for entry, cfg in cfgs:
        alike = json.dumps({**cfg, "seed": None}, sort_keys=True, default=str)
        if alike in known:
            continue
        known.add(alike)
        try:
            setup, _ = check(cfg, entry.overrides, dirs, dataset if cfg["data"]["source"] == source else None)
        except ConfigError as error:
            raise ConfigError(f"job {entry.name}: {error}") from error
        source, dataset = cfg["data"]["source"], setup.dataset


class _Progress:
    """Prints a line for each job that has ended."""

    def __init__(self, index: Index, total: int, done: int, quiet: bool) -> None:
        self._index, self._total, self._done, self._quiet = index, total, done, quiet
        if done and not quiet:
            print(f"{done} of {total} jobs are done already", file=sys.stderr)

    def __call__(self, entry: Entry, seconds: float) -> None:
        self._done += 1
        if self._quiet:
            return
        outcome = f"{entry.status}: {entry.error}" if entry.error else entry.status
        print(f"[{self._done}/{self._total}] {entry.name}  {outcome}  {seconds:.1f} s", file=sys.stderr, flush=True)
