"""A run from configuration to results: checked before anything is written, played, compared, reported."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from fedcl.building import plugin_directories
from fedcl.config import compose, config_hash, diff, remarks, to_yaml
from fedcl.data.dataset import Dataset
from fedcl.inbox import Line, lines
from fedcl.panel import marked
from fedcl.play import play
from fedcl.prepared import Prepared
from fedcl.results import schema
from fedcl.results.checkpoint import CheckpointError, Checkpoints
from fedcl.results.environment import create_run_dir, environment
from fedcl.results.recorder import write_atomic
from fedcl.results.report import terminal_report
from fedcl.results.run import Run, load
from fedcl.results.summary import add_reference
from fedcl.results.trackers import check as check_trackers
from fedcl.rules import ConfigError
from fedcl.simulation.backend import FlowerGrid
from fedcl.tuning import chosen, note_unstacked
from fedcl.wiring import Config, device_of, make_trackers

REFERENCE = schema.REFERENCE
_SERVING = (
    "unlearning.in_flight",
    "unlearning.recovery_rounds",
    "unlearning.reference",
    "unlearning.klom",
    "unlearning.references",
    "unlearning.trigger",
)
_VERSIONS = ("fedcl", "torch", "flwr")  # what decides a run's bits


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
    prepared, reference = check(cfg, overrides, config_dirs)
    if not quiet:
        for text in _remarks(cfg, overrides, config_dirs):
            print(f"fedcl: {text}", file=sys.stderr)
        note_unstacked(cfg, prepared)
    run_dir = _create_run_dir(cfg)
    launch = {
        "overrides": list(overrides),
        "config_dirs": [str(Path(folder).resolve()) for folder in config_dirs],
        "plugin_paths": [str(folder) for folder in plugin_directories(config_dirs)],
    }
    write_launch(cfg, run_dir, launch)
    play(cfg, prepared, run_dir, quiet=quiet, grid=grid)
    _finish(cfg, reference, run_dir, launch, quiet)
    return run_dir


def check(
    cfg: Config, overrides: Sequence[str], config_dirs: Sequence[Path], dataset: Dataset | None = None
) -> tuple[Prepared, Config | None]:
    """Return a run prepared, and its reference's configuration or None; nothing is written.

    ``dataset`` saves loading what is loaded already. Raises ConfigError if the configuration does not fit the data.
    """
    prepared = Prepared.of(cfg, dataset=dataset)
    check_trackers(make_trackers(cfg))
    marked(prepared.dataset, cfg["unlearning"]["trigger"])
    reference = _reference_config(cfg, overrides, config_dirs)
    if reference is not None:
        Prepared.of(reference, dataset=prepared.dataset if reference["data"] == cfg["data"] else None)
    return prepared, reference


def resume(run_dir: Path, force: bool, quiet: bool, grid: FlowerGrid | None = None) -> Path:
    """Go on with an interrupted run from its last checkpoint; a finished one is only summarised again.

    Raises
    ------
    ConfigError
        If the folder holds no usable checkpoint, or, without ``force``, if the settings or the versions that decide the
        run's bits have changed since it began.
    """
    cfg, env = launched(run_dir)
    launch = env["launch"]
    if not force:
        refuse_changes(run_dir, cfg, env)
    done = (run_dir / schema.STATUS).read_text().strip() == "done"
    waiting = unanswered(run_dir)
    if waiting or not done:
        prepared = Prepared.of(cfg)
        # one who came when all rounds were over may have chosen another unlearner
        over = done or _next_round(run_dir) == prepared.schedule.num_rounds
        overrides = next((line.overrides for line in waiting), ()) if over else ()
        serving = with_unlearner(cfg, launch, overrides)
        play(serving, prepared, run_dir, quiet=quiet, resuming=True, grid=grid, own=None if serving is cfg else cfg)
    reference = _reference_config(cfg, launch["overrides"], [Path(folder) for folder in launch["config_dirs"]])
    _finish(cfg, reference, run_dir, launch, quiet)
    return run_dir


def launched(run_dir: Path) -> tuple[Config, dict[str, Any]]:
    """Return a run's configuration and environment; code of the user's that it named can be found from then on."""
    cfg: Config = yaml.safe_load((run_dir / schema.CONFIG).read_text())
    env: dict[str, Any] = json.loads((run_dir / schema.ENV).read_text())
    for folder in env["launch"]["plugin_paths"]:
        if folder not in sys.path:
            sys.path.append(folder)
    return cfg, env


def unanswered(run_dir: Path) -> list[Line]:
    """Return the requests handed in to a run that its newest checkpoint does not know of."""
    handed_in, checkpoints = lines(run_dir), Checkpoints(run_dir)
    if not handed_in or not checkpoints.begun():
        return handed_in
    state = _newest(checkpoints)["server"].get("unlearning", {})
    answered = state.get("queue", {}).get("answered", {})
    return [line for line in handed_in if line.fault is None and line.request.to_json() not in answered]


def _next_round(run_dir: Path) -> int:
    checkpoints = Checkpoints(run_dir)
    return int(_newest(checkpoints)["server"]["next_round"]) if checkpoints.begun() else 0


def _newest(checkpoints: Checkpoints) -> Any:
    try:
        return checkpoints.load()[0]
    except CheckpointError as error:
        raise ConfigError(str(error)) from error


def with_unlearner(cfg: Config, launch: Mapping[str, Any], overrides: Sequence[str]) -> Config:
    """Return the configuration of a run that is over with another unlearner; itself without ``overrides``.

    What it had planned has been answered by its own, and is left out.

    Raises
    ------
    ConfigError
        If they change anything else, or are wrong.
    """
    if not overrides:
        return cfg
    for override in overrides:
        key = override.partition("=")[0].lstrip("+")
        if key.split(".")[0] != "unlearner" and ".".join(key.split(".")[:2]) not in _SERVING:
            raise ConfigError(f"{override}: here only unlearner, unlearner.* and {', '.join(_SERVING)} can be set")
    dirs = [Path(folder) for folder in launch["config_dirs"]]
    composed = compose(launch["overrides"], dirs, overrides)
    for text in remarks(launch["overrides"], dirs, overrides):
        if "left out" in text:
            print(f"fedcl: {text}", file=sys.stderr)
    settings = {key.partition(".")[2]: composed["unlearning"][key.partition(".")[2]] for key in _SERVING}
    trusted = sorted({*cfg["trusted_packages"], *composed["trusted_packages"]})
    own = {"unlearner": composed["unlearner"], "unlearning": {**cfg["unlearning"], **settings, "requests": []}}
    return {**cfg, **own, "trusted_packages": trusted}


def refuse_changes(run_dir: Path, cfg: Config, env: dict[str, Any]) -> None:
    """Refuse a run whose settings, or the versions that decide its bits, are others now.

    Raises
    ------
    ConfigError
        With the differences.
    """
    launch = env["launch"]
    now = compose(launch["overrides"], [Path(folder) for folder in launch["config_dirs"]])
    # these depend on where one stands and where the folder lies
    now |= {key: cfg[key] for key in ("trusted_packages", "run_dir")}
    changes = diff(cfg, now)
    here = environment(cfg["seed"], env["device"])["packages"]
    changes += [
        f"{name}: {env['packages'].get(name)} -> {here.get(name)}"
        for name in _VERSIONS
        if env["packages"].get(name) != here.get(name)
    ]
    if changes:
        raise ConfigError(
            f"{run_dir}: changed since the run began: {'; '.join(changes)}; --force goes on with the run's own settings"
        )


def _finish(cfg: Config, reference: Config | None, run_dir: Path, launch: dict[str, Any], quiet: bool) -> None:
    """Play the reference run if it is still to be played, add it to the summary, draw and print the report."""
    folder = run_dir / REFERENCE
    if reference is not None and not (folder / "summary.json").is_file():
        resuming = (folder / "STATUS").is_file()
        if not resuming:
            folder.mkdir(exist_ok=True)
            write_launch(reference, folder, launch)
        play(reference, Prepared.of(reference), folder, quiet=quiet, resuming=resuming, inbox=run_dir)
    if reference is not None:
        add_reference(run_dir, folder)
    finished = load(run_dir)
    page = _page(finished) if cfg["figures"] else None
    if not quiet:
        print(terminal_report(finished), end="" if page else "\n")
        if page is not None:
            print(f"report: {page}\n")


def _page(run: Run) -> Path:
    from fedcl.results import html  # matplotlib takes longer to import than a short run to play

    return html.write(run, defaults=compose([]))


def _reference_config(cfg: Config, overrides: Sequence[str], config_dirs: Sequence[Path]) -> Config | None:
    """Return the configuration of the run to compare with, or None where there is none or it is this run itself."""
    if cfg["compare_with"] is None:
        return None
    try:
        reference = compose(overrides, config_dirs, _reference_changes(cfg))
    except ValueError as error:
        raise ConfigError(f"compare_with={cfg['compare_with']}: {error}") from error
    own = {"compare_with": None, "run_dir": None, "name": ""}
    return None if {**reference, **own} == {**cfg, **own} else reference


def _reference_changes(cfg: Config) -> list[str]:
    return [*shlex.split(cfg["compare_with"]), "compare_with=null"]


def _remarks(cfg: Config, overrides: Sequence[str], config_dirs: Sequence[Path]) -> list[str]:
    """Return what is to be said of a run's configuration, and of its reference's where that differs."""
    said = remarks(overrides, config_dirs)
    if _reference_config(cfg, overrides, config_dirs) is not None:
        more = remarks(overrides, config_dirs, _reference_changes(cfg))
        said += [f"reference: {text}" for text in more if text not in said]
    return said


def _create_run_dir(cfg: Config) -> Path:
    try:
        return create_run_dir(cfg["run_dir"], cfg["name"], config=to_yaml(cfg), seed=cfg["seed"])
    except (ValueError, OSError) as error:
        raise ConfigError(str(error)) from error


def conclude(
    cfg: Config,
    overrides: Sequence[str],
    config_dirs: Sequence[Path],
    run_dir: Path,
    launch: dict[str, Any],
    quiet: bool,
) -> None:
    """Do what follows a run that has been played: its reference, its report."""
    _finish(cfg, _reference_config(cfg, overrides, config_dirs), run_dir, launch, quiet)


def write_launch(cfg: Config, folder: Path, launch: dict[str, Any]) -> None:
    """Write what a run is, and how it was asked for."""
    write_atomic(folder / schema.CONFIG, to_yaml(cfg))
    lines = "".join(f"- {json.dumps(override)}\n" for override in launch["overrides"])
    write_atomic(folder / schema.OVERRIDES, lines or "[]\n")
    env = {**environment(cfg["seed"], str(device_of(cfg))), "launch": launch, "config_hash": config_hash(cfg)}
    write_atomic(folder / schema.ENV, json.dumps(env, indent=2) + "\n")
