"""Tune on one data set, freeze, evaluate on another: what hyper-parameters are worth where they were not chosen.

Cha and Cho, "Hyperparameters in Continual Learning: A Reality Check", TMLR 2025: methods are compared with settings
that were tuned on another data set's stream of the same shape, because tuning on the stream that is reported flatters.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import yaml

from fedcl.base.files import write_atomic
from fedcl.config.compose import Config, compose, to_yaml
from fedcl.config.overrides import as_text
from fedcl.config.value_rules import ConfigError
from fedcl.results import reading, schema
from fedcl.results.environment import create_run_dir
from fedcl.results.intervals import half_width
from fedcl.results.launches import Trust
from fedcl.results.locking import hold
from fedcl.runs import experiment

PLAN, RESULT, BEST = "protocol.yaml", "protocol.json", "best.yaml"


@dataclass(frozen=True)
class Launch:
    """How every run of a protocol is started, beside its own settings."""

    overrides: tuple[str, ...]
    config_dirs: tuple[Path, ...]

    def config(self, extra: Sequence[str]) -> Config:
        """Compose one run's configuration; ConfigError if it is wrong."""
        return compose([*self.overrides, *extra], self.config_dirs)

    def run(self, folder: Path, extra: Sequence[str]) -> dict[str, float]:
        """Return the summary of a run in ``folder``: the run is started, resumed, or read where it is done."""
        if reading.status(folder) != "done":
            settings = [*self.overrides, *extra, as_text("run_dir", folder)]
            if (folder / schema.CONFIG).is_file():
                experiment.resume(folder, False, True, trust=Trust(self.config_dirs))
            else:
                experiment.run(compose(settings, self.config_dirs), settings, self.config_dirs, True)
        return reading.summary(folder)


def two_phase(cfg: Config, overrides: Sequence[str], config_dirs: Sequence[Path], quiet: bool) -> Path:
    """Run both phases in one folder and return it; in a folder that holds the same plan, continue.

    ``protocol.json`` has every candidate's metric and, for each key of the summary, mean and 95 % interval over the
    evaluation's seeds; ``best.yaml`` the settings chosen.

    Raises
    ------
    ConfigError
        If the two data sets are one, or the folder holds another plan; nothing is written then.
    """
    plan = cfg["protocol"]
    own = [text for text in overrides if not text.lstrip("+~").startswith(("protocol", "run_dir", "seed="))]
    launch = Launch((*own, "protocol=none"), tuple(config_dirs))
    candidates = _candidates(plan)
    _refuse_one_data_set(plan, launch, candidates)
    folder = _folder(cfg, {**plan, "overrides": own})
    with hold(folder):
        _both_phases(plan, launch, candidates, folder, quiet=quiet)
    return folder


def _both_phases(
    plan: Mapping[str, Any], launch: Launch, candidates: Sequence[Sequence[str]], folder: Path, *, quiet: bool
) -> None:
    tried = [_tried(plan, launch, folder / "tune" / str(i), candidate) for i, candidate in enumerate(candidates)]
    best = _best(tried, higher=plan["higher_is_better"])
    write_atomic(folder / BEST, yaml.safe_dump(candidates[best]))
    if not quiet:
        print(f"tuned: {' '.join(candidates[best])}  {plan['metric']} {tried[best]['mean']:.4f}")
    final = [*plan["evaluate_on"], *candidates[best]]
    runs = {
        seed: launch.run(folder / "evaluate" / f"seed_{seed}", [*final, f"seed={seed}"])
        for seed in plan["evaluate_seeds"]
    }
    result: dict[str, Any] = {
        "tuned": tried,
        "best": candidates[best],
        "evaluated": _over_seeds(list(runs.values())),
    }
    write_atomic(folder / RESULT, json.dumps(result, indent=2) + "\n")
    if not quiet:
        value = result["evaluated"][plan["metric"]]
        print(f"evaluated: {plan['metric']} {value['mean']:.4f} ± {value['half_width']:.4f} over {len(runs)} seeds")


def _candidates(plan: Mapping[str, Any]) -> list[list[str]]:
    """Return every combination of the search's values, each as overrides; ConfigError if ``evaluate_on`` is empty."""
    if not plan["evaluate_on"]:
        raise ConfigError("protocol.evaluate_on=[]: must be a list such as ['data=mnist']")
    options = []
    for text in plan["search"]:
        key, _, values = text.partition("=")
        options.append([f"{key}={value}" for value in values.split(",")])
    return [list(choice) for choice in product(*options)]


def _refuse_one_data_set(plan: Mapping[str, Any], launch: Launch, candidates: Sequence[Sequence[str]]) -> None:
    for candidate in candidates:
        cfgs = [launch.config([*plan[phase], *candidate]) for phase in ("tune_on", "evaluate_on")]
        sources = [(cfg["data"]["source"].get("_target_"), cfg["data"].get("root")) for cfg in cfgs]
        if sources[0] == sources[1]:
            raise ConfigError(
                f"protocol.evaluate_on={plan['evaluate_on']}: must be another data set than protocol.tune_on's; "
                f"both are {sources[0][0]} root={sources[0][1]}"
            )


def _folder(cfg: Config, plan: Mapping[str, Any]) -> Path:
    """Return the protocol's folder: a new one, or the given one where it holds the same plan already."""
    text = to_yaml(plan)
    given = cfg["run_dir"] and Path(cfg["run_dir"])
    if given and (given / PLAN).is_file():
        if reading.text(given / PLAN) != text:
            raise ConfigError(f"run_dir={given}: holds another protocol; choose another folder")
        return given
    try:
        folder = create_run_dir(cfg["run_dir"], cfg["name"], config=text, seed=cfg["seed"])
    except (ValueError, OSError) as error:
        raise ConfigError(str(error)) from error
    write_atomic(folder / PLAN, text)
    return folder


def _tried(plan: Mapping[str, Any], launch: Launch, folder: Path, candidate: Sequence[str]) -> dict[str, Any]:
    """Return a candidate with its metric for each tuning seed."""
    settings = [*plan["tune_on"], *candidate, "compare_with=null", "figures=false"]
    values = []
    for seed in plan["tune_seeds"]:
        summary = launch.run(folder / f"seed_{seed}", [*settings, f"seed={seed}"])
        if plan["metric"] not in summary:
            raise ConfigError(f"protocol.metric={plan['metric']}: not in the summary, which has {', '.join(summary)}")
        value = summary[plan["metric"]]
        values.append(math.nan if value is None else value)
    return {"settings": list(candidate), "values": values, "mean": statistics.fmean(values)}


def _best(tried: Sequence[Mapping[str, Any]], *, higher: bool) -> int:
    """Return the first of the best candidates; one whose metric is not a number is never chosen."""
    scored = [
        (row["mean"] if higher else -row["mean"], -i) for i, row in enumerate(tried) if not math.isnan(row["mean"])
    ]
    if not scored:
        raise ConfigError("protocol.metric: is not a number for any candidate")
    return -max(scored)[1]


def _over_seeds(summaries: Sequence[Mapping[str, float]]) -> dict[str, dict[str, Any]]:
    common = [key for key in summaries[0] if all(isinstance(s.get(key), int | float) for s in summaries)]
    result = {}
    for key in common:
        values = [float(summary[key]) for summary in summaries]
        finite = all(math.isfinite(value) for value in values)
        result[key] = {
            "mean": statistics.fmean(values),
            "half_width": half_width(values) if finite and len(values) > 1 else float("nan"),
            "values": values,
        }
    return result
