"""A run from configuration to results: checked before anything is written, run, compared, reported."""

from __future__ import annotations

import functools
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fedcl.assembly import device_of, make_trackers
from fedcl.config.compose import Config, compose, config_hash, remarks, to_yaml
from fedcl.config.own_code import plugin_directories
from fedcl.config.value_rules import ConfigError
from fedcl.data.dataset import Dataset
from fedcl.results import reading, schema, sums
from fedcl.results.checkpoint import Checkpoints
from fedcl.results.environment import create_run_dir, environment, refuse_used
from fedcl.results.launches import Launched, Trust, launched
from fedcl.results.locking import hold
from fedcl.results.report import terminal_report
from fedcl.results.run import Run, load
from fedcl.results.summary import add_reference, summary
from fedcl.results.trackers import check as check_trackers
from fedcl.results.writing import to_parquet, write_launch, write_summary
from fedcl.runs.autotune import chosen, note_unstacked
from fedcl.runs.session import run_session
from fedcl.runs.setup import Setup
from fedcl.runs.unlearning_metrics import marked
from fedcl.simulation.backend import FlowerGrid
from fedcl.unlearning.sources import Line, lines

REFERENCE = schema.REFERENCE
_SERVING = (
    "unlearning.in_flight",
    "unlearning.recovery_rounds",
    "unlearning.reference",
    "unlearning.klom",
    "unlearning.references",
    "unlearning.trigger",
)


def run(
    cfg: Config, overrides: Sequence[str], config_dirs: Sequence[Path], quiet: bool, grid: FlowerGrid | None = None
) -> Path:
    """Run an experiment and, unless ``compare_with`` is null, its reference; return the run's folder.

    Raises
    ------
    ConfigError
        If the configuration does not fit the data; nothing has been written then.
    """
    cfg, overrides = chosen(cfg, overrides, config_dirs, quiet)
    setup, reference = check(cfg, overrides, config_dirs)
    if not quiet:
        for text in _remarks(cfg, overrides, config_dirs):
            print(f"fedcl: {text}", file=sys.stderr)
        for note in setup.notes:
            print(f"data: {note}", file=sys.stderr)
        note_unstacked(cfg, setup)
    launch = {
        "overrides": list(overrides),
        "config_dirs": [str(Path(folder).resolve()) for folder in config_dirs],
        "plugin_paths": [str(folder) for folder in plugin_directories(config_dirs)],
    }
    with new_folder(cfg) as run_dir:
        begin(cfg, run_dir, launch)
        run_session(cfg, setup, run_dir, quiet=quiet, grid=grid)
        finish(cfg, reference, run_dir, launch, quiet)
    return run_dir


def check(
    cfg: Config, overrides: Sequence[str], config_dirs: Sequence[Path], dataset: Dataset | None = None
) -> tuple[Setup, Config | None]:
    """Return a run's setup, and its reference's configuration or None; nothing is written.

    ``dataset`` saves loading what is loaded already. Raises ConfigError if the configuration does not fit the data.
    """
    setup = Setup.of(cfg, dataset=dataset)
    check_trackers(make_trackers(cfg))
    marked(setup.dataset, cfg["unlearning"]["trigger"])
    reference = reference_config(cfg, overrides, functools.partial(_composed, config_dirs))
    if reference is not None:
        Setup.of(reference, dataset=setup.dataset if reference["data"] == cfg["data"] else None)
    return setup, reference


def resume(run_dir: Path, force: bool, quiet: bool, grid: FlowerGrid | None = None, trust: Trust | None = None) -> Path:
    """Continue an interrupted run from its last checkpoint; a finished one is only summarised again.

    ``trust`` says whose code the folder may run besides fedcl's.

    Raises
    ------
    ConfigError
        If another process is using the folder, or the folder holds no usable checkpoint, or, without ``force``, if
        the settings or the versions that decide the run's bits have changed since it began.
    """
    with hold(run_dir):
        go_on(launched(run_dir, trust, checked=False, force=force), force=force, quiet=quiet, grid=grid)
    return run_dir


def go_on(run: Launched, *, force: bool, quiet: bool, grid: FlowerGrid | None = None) -> None:
    """Do what :func:`resume` does, in a folder that this process holds."""
    run_dir, cfg = run.run_dir, run.cfg
    if force:
        sums.accept(run_dir)
    else:
        run.refuse_changes()
    done = reading.status(run_dir) == "done"
    waiting = unanswered(run_dir)
    if waiting or not done:
        setup = Setup.of(cfg)
        # a request that came after the last round may have chosen another unlearner
        over = done or _next_round(run_dir) == setup.schedule.num_rounds
        overrides = next((line.overrides for line in waiting), ()) if over else ()
        serving = with_unlearner(run, overrides)
        run_session(serving, setup, run_dir, quiet=quiet, resuming=True, grid=grid, own=None if serving is cfg else cfg)
    else:
        repair(run_dir)
    reference = reference_config(cfg, run.launch["overrides"], run.compose)
    finish(cfg, reference, run_dir, run.launch, quiet)


def unanswered(run_dir: Path) -> list[Line]:
    """Return the requests submitted to a run that its newest checkpoint does not know of."""
    submitted, checkpoints = lines(run_dir), Checkpoints(run_dir)
    if not submitted or not checkpoints.begun():
        return submitted
    state = checkpoints.load()[0]["server"].get("unlearning", {})
    answered = state.get("queue", {}).get("answered", {})
    return [line for line in submitted if line.fault is None and line.request.to_json() not in answered]


def _next_round(run_dir: Path) -> int:
    checkpoints = Checkpoints(run_dir)
    return int(checkpoints.load()[0]["server"]["next_round"]) if checkpoints.begun() else 0


def with_unlearner(run: Launched, overrides: Sequence[str]) -> Config:
    """Return the configuration of a run that is over with another unlearner; its own without ``overrides``.

    Its planned requests are left out: its own unlearner has processed them.

    Raises
    ------
    ConfigError
        If they change anything else, or are wrong.
    """
    cfg = run.cfg
    if not overrides:
        return cfg
    for override in overrides:
        key = override.partition("=")[0].lstrip("+")
        if key.split(".")[0] != "unlearner" and ".".join(key.split(".")[:2]) not in _SERVING:
            raise ConfigError(f"{override}: here only unlearner, unlearner.* and {', '.join(_SERVING)} can be set")
    composed = run.compose(run.launch["overrides"], overrides)
    for text in remarks(run.launch["overrides"], run.config_dirs, overrides):
        if "left out" in text:
            print(f"fedcl: {text}", file=sys.stderr)
    settings = {key.partition(".")[2]: composed["unlearning"][key.partition(".")[2]] for key in _SERVING}
    trusted = sorted({*cfg["trusted_packages"], *composed["trusted_packages"]})
    own = {"unlearner": composed["unlearner"], "unlearning": {**cfg["unlearning"], **settings, "requests": []}}
    return {**cfg, **own, "trusted_packages": trusted}


def repair(run_dir: Path) -> None:
    """Rewrite the files of a finished run that are missing or damaged and follow from its tables.

    Raises
    ------
    ConfigError
        If that needs a file that is damaged as well.
    """
    for table, columns in ((schema.METRICS, schema.METRIC_COLUMNS), (schema.TIMINGS, schema.TIMING_COLUMNS)):
        lines, parquet = run_dir / f"{table}.jsonl", run_dir / f"{table}.parquet"
        if _is_lost(parquet):
            reading.lines(lines)  # refused if it is damaged
            to_parquet(lines, parquet, columns)
    if _is_lost(run_dir / schema.SUMMARY):
        checkpoints = Checkpoints(run_dir)
        if not checkpoints.begun():
            raise reading.Damaged(run_dir / schema.SUMMARY, "is lost, and there is no checkpoint", "run it again")
        up, down = checkpoints.load()[0]["server"]["bytes"]
        known = sums.read(run_dir)
        if known:
            sums.write(run_dir, {name: digests for name, digests in known.items() if name != schema.SUMMARY})
        (run_dir / schema.SUMMARY).unlink(missing_ok=True)
        write_summary(run_dir, summary(run_dir, up, down))
        if known:
            text = (run_dir / schema.SUMMARY).read_text(encoding="utf-8")
            sums.write(run_dir, {**known, **sums.of_texts({schema.SUMMARY: text})})


def _is_lost(path: Path) -> bool:
    try:
        return not (reading.summary(path.parent) if path.name == schema.SUMMARY else reading.content(path))
    except reading.Damaged:
        if path.is_dir():
            raise
        return True


def finish(cfg: Config, reference: Config | None, run_dir: Path, launch: dict[str, Any], quiet: bool) -> None:
    """Run the reference unless it is done, add it to the summary, draw and print the report."""
    folder = run_dir / REFERENCE
    if reference is not None and reading.status(folder) != "done":
        resuming = (folder / schema.CONFIG).exists()
        if not resuming:
            folder.mkdir(exist_ok=True)
            begin(reference, folder, launch)
        run_session(reference, Setup.of(reference), folder, quiet=quiet, resuming=resuming, requests_from=run_dir)
    if reference is not None:
        repair(folder)
        add_reference(run_dir, folder)
    finished = load(run_dir)
    page = _page(finished) if cfg["figures"] else None
    if not quiet:
        print(terminal_report(finished), end="" if page else "\n")
        if page is not None:
            print(f"report: {page}\n")


def _page(run: Run) -> Path:
    from fedcl.results import html  # importing matplotlib takes longer than a short run

    return html.write(run, defaults=compose([]))


def reference_config(
    cfg: Config, overrides: Sequence[str], composed: Callable[[Sequence[str], Sequence[str]], Config]
) -> Config | None:
    """Return the configuration of the run to compare with, or None if there is none or it is this run itself."""
    if cfg["compare_with"] is None:
        return None
    try:
        reference = composed(overrides, _reference_changes(cfg))
    except ValueError as error:
        raise ConfigError(f"compare_with={cfg['compare_with']}: {error}") from error
    own = {"compare_with": None, "run_dir": None, "name": ""}
    return None if {**reference, **own} == {**cfg, **own} else reference


def _composed(config_dirs: Sequence[Path], overrides: Sequence[str], changes: Sequence[str] = ()) -> Config:
    return compose(overrides, config_dirs, changes)


def _reference_changes(cfg: Config) -> list[str]:
    return [*shlex.split(cfg["compare_with"]), "compare_with=null"]


def _remarks(cfg: Config, overrides: Sequence[str], config_dirs: Sequence[Path]) -> list[str]:
    """Return remarks on a run's configuration, and on its reference's where that differs."""
    found = remarks(overrides, config_dirs)
    if reference_config(cfg, overrides, functools.partial(_composed, config_dirs)) is not None:
        more = remarks(overrides, config_dirs, _reference_changes(cfg))
        found += [f"reference: {text}" for text in more if text not in found]
    return found


@contextmanager
def new_folder(cfg: Config) -> Iterator[Path]:
    """Make the folder of a new run, and lock it.

    Raises
    ------
    ConfigError
        If there is a run in it, or it cannot be written.
    """
    try:
        run_dir = create_run_dir(cfg["run_dir"], cfg["name"], config=to_yaml(cfg), seed=cfg["seed"])
    except (ValueError, OSError) as error:
        raise ConfigError(str(error)) from error
    with hold(run_dir):
        refuse_used(run_dir)  # again: another run may have started there before the folder was locked
        yield run_dir


def begin(cfg: Config, folder: Path, launch: dict[str, Any]) -> None:
    """Write a run's configuration, and how it was started."""
    env = {**environment(cfg["seed"], str(device_of(cfg))), "launch": launch, "config_hash": config_hash(cfg)}
    write_launch(folder, to_yaml(cfg), launch["overrides"], env)
