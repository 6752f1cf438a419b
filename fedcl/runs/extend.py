"""More tasks, or more rounds, for a run that is done: a new run that begins where the old one could have gone on.

What it ends with is, bit for bit, what a run ends with that had them from the start. Where that cannot be, because the
tasks so far or the model would have been others, it is refused.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedcl.assembly import local_work, make_model, make_strategy
from fedcl.base.files import write_atomic
from fedcl.config.compose import Config, diff
from fedcl.config.own_code import plugin_directories
from fedcl.config.value_rules import ConfigError
from fedcl.contracts.strategy import Projection
from fedcl.results import reading, schema
from fedcl.results.checkpoint import Checkpoints
from fedcl.results.launches import Trust, launched
from fedcl.results.locking import hold
from fedcl.results.target import was_reached
from fedcl.runs.experiment import begin, finish, new_folder, reference_config
from fedcl.runs.session import run_session
from fedcl.runs.setup import Setup
from fedcl.server.strategy import Pipeline
from fedcl.unlearning.sources import lines

_MAY_CHANGE = ("rounds_per_task", "scenario")
_NOT_COMPARED = ("run_dir", "trusted_packages")
_PLAIN = (int, float, str, bool, tuple, type(None))
Saved = tuple[Any, dict[str, tuple[int, Any]]]


def extend(run_dir: Path, overrides: Sequence[str], *, force: bool, quiet: bool, trust: Trust | None = None) -> Path:
    """Run what is new and return the folder of the extended run; the old one stays as it is.

    Parameters
    ----------
    run_dir
        The folder of a run that is done.
    overrides
        ``rounds_per_task``, ``scenario.*``, and perhaps ``run_dir`` for the new folder.
    force
        Also if the code or the settings have changed since.
    quiet
        Say nothing while it goes on.
    trust
        Whose code the folder may run besides fedcl's.

    Raises
    ------
    ConfigError
        If the run is not done, or the longer one would not have begun as this one did; nothing has been written then.
    """
    with ExitStack() as stack:
        looking = stack.enter_context(ExitStack())
        looking.enter_context(hold(run_dir))  # nobody changes it while it is looked at and copied
        run = launched(run_dir, trust, checked=False, force=force)
        cfg = run.cfg
        if not force:
            run.refuse_changes()
        _refuse_unfit(run_dir, cfg)
        settings = [*_without(run.launch["overrides"], overrides), *overrides]
        longer = run.compose(settings)
        _refuse_other_settings(cfg, longer)
        old = Setup.of(cfg)
        new = Setup.of(longer, dataset=old.dataset)
        _refuse_another_past(old, new)
        saved = _last_common(run_dir, cfg, longer, old, new)
        folder = stack.enter_context(new_folder(longer))
        launch = {
            "overrides": settings,
            "config_dirs": [str(path) for path in run.config_dirs],
            "plugin_paths": [str(path) for path in plugin_directories(run.config_dirs)],
            "extends": str(run_dir.resolve()),
        }
        begin(longer, folder, launch)
        _begin(run_dir, folder, saved, old, new)
        looking.close()
        run_session(longer, new, folder, quiet=quiet, resuming=True)
        finish(longer, reference_config(longer, settings, run.compose), folder, launch, quiet)
    return folder


def _refuse_other_settings(cfg: Config, longer: Config) -> None:
    other = [
        line for line in diff(cfg, longer) if not line.partition(":")[0].startswith((*_MAY_CHANGE, *_NOT_COMPARED))
    ]
    if other:
        raise ConfigError(f"{other[0]}: only rounds_per_task and scenario.* can be set for a run that goes on")


def _refuse_unfit(run_dir: Path, cfg: Config) -> None:
    status = reading.status(run_dir)
    if status != "done":
        why = f"is {status}, not done" if status != "unknown" else f"its {schema.STATUS} is missing or damaged"
        raise ConfigError(f"{run_dir}: {why}; first: fedcl resume {run_dir}")
    if cfg["backend"]["name"] == "flower":
        raise ConfigError(f"{run_dir}: ran on devices, which have their state themselves; it cannot be extended")
    if cfg["unlearning"]["requests"] or lines(run_dir):
        raise ConfigError(f"{run_dir}: has processed unlearning requests at its end; it cannot be extended")
    if was_reached(run_dir):
        raise ConfigError(f"{run_dir}: has reached its target_accuracy; there is nothing to go on with")


def _without(before: Sequence[str], changed: Sequence[str]) -> list[str]:
    replaced = {text.partition("=")[0] for text in changed} | {"run_dir"}
    return [text for text in before if text.partition("=")[0] not in replaced]


def _refuse_another_past(old: Setup, new: Setup) -> None:
    """Refuse streams that differ in what the old one had: its heads, its parts, its tasks."""
    if old.stream.heads != new.stream.heads:
        raise ConfigError(
            f"scenario: the model would have heads of {list(new.stream.heads)} columns and has {list(old.stream.heads)}"
        )
    parts = zip((*old.partition.train, *old.partition.test), (*new.partition.train, *new.partition.test), strict=True)
    if not all(np.array_equal(before, after) for before, after in parts):
        raise ConfigError("scenario: clients would hold other samples than they did")
    if new.stream.num_tasks < old.stream.num_tasks:
        raise ConfigError(f"scenario.num_tasks={new.stream.num_tasks}: must be >= {old.stream.num_tasks}, as it was")
    if old.stream.online != new.stream.online:
        raise ConfigError(f"scenario.online={new.stream.online}: must be what it was")
    for task in range(old.stream.num_tasks):
        seen = range(task + 1)
        for client in old.clients:
            one, two = (stream.client_task(task, client, seen) for stream in (old.stream, new.stream))
            if one != two:
                changed = [name for name in one.__slots__ if getattr(one, name) != getattr(two, name)]
                raise ConfigError(f"scenario: task {task} would have had other {', '.join(changed)} than it had")
        if old.stream.test_task(task, after=seen) != new.stream.test_task(task, after=seen):
            raise ConfigError(f"scenario: task {task} would be tested differently")


def _last_common(run_dir: Path, cfg: Config, longer: Config, old: Setup, new: Setup) -> Saved:
    """Return the newest checkpoint up to which both runs are the same."""
    _refuse_horizons(cfg, longer, old, new)
    horizon = longer["client"]["schedule"].get("horizon", "local")
    if horizon == "run" and old.schedule.num_rounds != new.schedule.num_rounds:
        raise ConfigError("client.schedule.horizon=run: with other rounds the past would have had other learning rates")
    asks = _asks(cfg, old)
    shared = next(
        (r for r in range(old.schedule.num_rounds) if not _same(old, new, r, horizon == "task")),
        old.schedule.num_rounds,
    )
    if shared == new.schedule.num_rounds:
        raise ConfigError(f"rounds_per_task={longer['rounds_per_task']}: leaves nothing to run")
    if asks and shared == old.schedule.num_rounds:  # parts may do less at the end of a run's last task
        shared -= 1
    kept = []
    for state, clients in Checkpoints(run_dir).every():
        kept.append(state["server"]["next_round"])
        if state["server"]["next_round"] <= shared:
            return state, clients
    why = f"; {asks} does something else at the end of the last task" if asks else ""
    raise ConfigError(
        f"{run_dir}: needs a checkpoint of the first {shared} rounds or fewer, which both runs share{why}; there are "
        f"those after {', '.join(map(str, kept)) or 'none'}. checkpoint.keep and checkpoint.min_seconds keep more"
    )


def _same(old: Setup, new: Setup, server_round: int, counted: bool) -> bool:
    if server_round >= new.schedule.num_rounds or old.schedule.stage(server_round) != new.schedule.stage(server_round):
        return False
    for client in old.clients:
        one, two = (run.schedule.position(client, server_round) for run in (old, new))
        if one is None or two is None:
            alike = one is two
        elif old.stream.online or counted:  # a round's part of the task, or its rate, depends on how many there are
            alike = one == two
        else:
            alike = one.is_last == two.is_last and replace(one, num_rounds=0) == replace(two, num_rounds=0)
        if not alike:
            return False
    return True


def _asks(cfg: Config, setup: Setup) -> str:
    """Return the part that acts at the ends of tasks, where the run's last may differ; empty if none does."""
    strategy = _strategy(cfg, setup)
    part = strategy.projection if isinstance(strategy, Pipeline) else Projection()
    listens = type(part).queries is not Projection.queries or type(part).finalize is not Projection.finalize
    return type(part).__name__ if listens else ""


def _refuse_horizons(cfg: Config, longer: Config, old: Setup, new: Setup) -> None:
    """Refuse parts that depend on the number of rounds of the whole run: they would have begun differently."""
    found = []
    for settings, setup in ((cfg, old), (longer, new)):
        strategy = _strategy(settings, setup)
        parts = strategy.parts if isinstance(strategy, Pipeline) else {}
        found.append(
            {
                f"{type(part).__name__}": {key: value for key, value in vars(part).items() if isinstance(value, _PLAIN)}
                for part in parts.values()
            }
        )
    changed = [name for name in found[0] if found[0][name] != found[1][name]]
    if changed:
        raise ConfigError(
            f"rounds_per_task: {changed[0]} depends on the rounds of the whole run; it would have begun differently"
        )


def _strategy(cfg: Config, setup: Setup) -> Any:
    model = make_model(cfg, setup.dataset, setup.stream, torch.device("cpu"))
    work = local_work(cfg, model, setup.stream, setup.schedule, setup.dataset.input_shape)
    return make_strategy(cfg, model, {client: i for i, client in enumerate(setup.clients)}, work)


def _begin(run_dir: Path, folder: Path, saved: Saved, old: Setup, new: Setup) -> None:
    """Write the tables and the checkpoint that the extended run goes on from."""
    state, clients = saved
    offsets, digests = {}, {}
    for table in schema.TABLES:
        text = (reading.content(run_dir / f"{table}.jsonl") or b"")[: state["offsets"][table]]
        kept = _as_if_longer(table, text, state["server"]["next_round"] == old.schedule.num_rounds, old, new)
        write_atomic(folder / f"{table}.jsonl", kept)
        offsets[table] = len(kept.encode())
        digests[table] = hashlib.sha256(kept.encode()).hexdigest()
    visits = {client: visit for client, (visit, _) in clients.items()}
    last = state["server"]["next_round"] - 1
    state = {**state, "offsets": offsets, "digests": digests}
    Checkpoints(folder).save(last, state, visits, lambda client, _: clients[client][1])


def _as_if_longer(table: str, text: bytes, ended: bool, old: Setup, new: Setup) -> str:
    """Return a table as the longer run would have it, but for tests on the tasks that it did not know of."""
    kept = []
    for line in text.decode().splitlines(keepends=True):
        record: Mapping[str, Any] = json.loads(line)
        last = ended and record["round"] == old.schedule.num_rounds - 1
        if table == schema.METRICS and last and str(record["name"]).startswith("accuracy_class_"):
            continue  # which is measured after a run's last round
        if table == schema.EVENTS and record["kind"] == "partition":
            tasks = [list(new.stream.train_task(k).classes) for k in range(new.stream.num_tasks)]
            line = json.dumps({**record, "tasks": tasks}) + "\n"
        kept.append(line)
    return "".join(kept)
