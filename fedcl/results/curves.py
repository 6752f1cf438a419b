"""Accuracy curves out of the metrics table, and the numbers of the summary that are theirs."""

# N = evaluations, T = tasks
from __future__ import annotations

import math

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from fedcl.evaluation.stability import (
    aggregation_drop,
    anytime_accuracy,
    min_accuracy,
    windowed_forgetting,
    windowed_plasticity,
    worst_case_accuracy,
)
from fedcl.results.run import Run

WINDOWS = (10, 100)  # evaluations, as in De Lange et al. (ICLR 2023)
Curve = tuple[NDArray[np.float64], list[int]]


def round_curve(run: Run) -> Curve | None:
    """Return the global model's accuracy by round, (N, T), and the row with which each task was learned, -1 for none.

    A task is met when the first client trains it, and learned with the last test of the stage in which that was; before
    it is met it is NaN. None where nothing was tested after training began.
    """
    rows = run.accuracy[run.accuracy["round"] >= 0]
    trained = run.metrics[(run.metrics["phase"] == "train") & (run.metrics["name"] == "num_examples")]
    met = trained.groupby("task")["round"].min()
    if rows.empty or met.empty:
        return None
    stages = rows.groupby("after")["round"].max()  # the last test of each stage
    seen = rows[rows["round"] >= rows["task"].map(met).fillna(np.inf)]
    table = seen.drop_duplicates(["round", "task"], keep="last").pivot(index="round", columns="task", values="value")
    # a task without test samples has a column too: that it was learned makes all others earlier ones
    table = table.reindex(columns=range(int(max(rows["task"].max(), met.index.max())) + 1))
    ends = {task: stages[stages >= first].min() for task, first in met.items()}
    rounds = list(table.index)
    learned = [rounds.index(ends[task]) if ends.get(task) in rounds else -1 for task in table.columns]
    return table.to_numpy(dtype=np.float64), learned


def client_curves(run: Run) -> dict[str, Curve]:
    """Return each client's accuracy by local step, as `round_curve`: a task is learned with its last step."""
    table = run.metrics[run.metrics["phase"] == "iteration"]
    curves = {}
    for client, rows in table.groupby("client"):
        wide = rows.pivot_table(index=["round", "step"], columns="task", values="value", aggfunc="last")
        trained = rows.drop_duplicates(["round", "step"]).set_index(["round", "step"])["after"].reindex(wide.index)
        wide = wide.reindex(columns=range(int(max(rows["task"].max(), rows["after"].max())) + 1))
        learned = [int(np.flatnonzero(trained == task)[-1]) if (trained == task).any() else -1 for task in wide.columns]
        curves[str(client)] = (wide.to_numpy(dtype=np.float64), learned)
    return curves


def stability(run: Run) -> dict[str, float]:
    """Return the keys ``stability/...`` that the run has curves for; rates in [0, 1].

    ``stability/round/...`` is the global model's curve by round, ``stability/iteration/...`` the mean over clients of
    their own curves by local step.
    """
    result: dict[str, float] = {}
    rounds = round_curve(run)
    if rounds is not None:
        result |= {f"stability/round/{name}": value for name, value in _numbers(*rounds).items()}
    clients = [_numbers(*curve) for curve in client_curves(run).values()]
    for name in clients[0] if clients else ():
        result[f"stability/iteration/{name}"] = _nan_mean([numbers[name] for numbers in clients])
    drop = _drop(run)
    if not math.isnan(drop):
        result["stability/aggregation_drop"] = drop
    return result


def anytime(run: Run) -> float:
    """Return the mean over rounds of the mean accuracy on the tasks met; NaN where no round was tested."""
    rounds = round_curve(run)
    return float("nan") if rounds is None else anytime_accuracy(rounds[0])


def _numbers(curve_NT: NDArray[np.float64], learned_T: list[int]) -> dict[str, float]:
    numbers = {
        "min_accuracy": min_accuracy(curve_NT, learned_T),
        "worst_case_accuracy": worst_case_accuracy(curve_NT, learned_T),
    }
    for window in WINDOWS:
        numbers[f"forgetting_{window}"] = windowed_forgetting(curve_NT, window)
        numbers[f"plasticity_{window}"] = windowed_plasticity(curve_NT, window)
    return numbers


def _drop(run: Run) -> float:
    """Return what a client's accuracy on its present task loses between its training and the model it receives next."""
    table = run.metrics[run.metrics["phase"].isin(("received", "trained")) & (run.metrics["name"] == "accuracy")]
    wide = table.pivot_table(index=["client", "task", "round"], columns="phase", values="value", aggfunc="last")
    if not {"received", "trained"} <= set(wide.columns):
        return float("nan")
    received = wide.groupby(level=["client", "task"])["received"].shift(-1)
    return aggregation_drop(wide["trained"].to_numpy(), received.to_numpy())


def _nan_mean(values: list[float]) -> float:
    present = [value for value in values if not math.isnan(value)]
    return float(np.mean(present)) if present else float("nan")


def client_forgetting(run: Run) -> pd.Series[float]:
    """Return by client what it forgot of its earlier tasks, from its personal rows; NaN where it has had one task only.

    For each task: the best accuracy at the end of a stage before the last, minus the accuracy at the last (Chaudhry).
    A client that was not heard of at the last is left out.
    """
    table = run.metrics[(run.metrics["phase"] == "personal") & (run.metrics["name"] == "accuracy")]
    table = table[table["client"].isin(run.by_client("personal"))]
    result = {}
    for client, rows in table.groupby("client"):
        wide = rows.drop_duplicates(["after", "task"], keep="last").pivot(index="after", columns="task", values="value")
        earlier = wide.iloc[:-1]
        lost = (earlier.max() - wide.iloc[-1])[earlier.notna().any()]
        result[str(client)] = float(lost.mean()) if len(lost) else float("nan")
    return pd.Series(result, dtype=np.float64)


def cost_by_round(run: Run) -> pd.DataFrame:
    """Return what had been spent by the end of each round, index round.

    Columns, each where it was recorded: ``bytes`` (model and payloads, both ways), ``flops`` (of training: FLOPs a
    sample times samples trained on), ``virtual_time`` (s).
    """
    table = run.metrics[run.metrics["round"] >= 0]
    rounds = np.unique(table["round"])
    columns = {"virtual_time": table.groupby("round")["virtual_time"].max()}
    server = table[table["phase"] == "server"]
    traffic = [server[server["name"] == name].groupby("round")["value"].last() for name in ("bytes_up", "bytes_down")]
    if all(len(series) for series in traffic):
        columns["bytes"] = traffic[0] + traffic[1]
    flops = run.metrics[(run.metrics["phase"] == "server") & (run.metrics["name"] == "flops_per_sample")]["value"]
    trained = table[(table["phase"] == "train") & (table["name"] == "samples_trained")]
    if len(flops) and len(trained):
        samples = trained.groupby("round")["value"].sum().reindex(rounds, fill_value=0.0)
        columns["flops"] = float(flops.iloc[-1]) * samples.cumsum()
    return pd.DataFrame(columns, index=rounds)
