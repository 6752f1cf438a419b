"""Continual-learning metrics of one accuracy matrix, and metrics of personal models.

Throughout, ``accuracy_TT[i, j]`` in [0, 1] is the test accuracy on task j after the stream has finished task i, NaN
where it was not measured. Rows are times and columns are tests, and are left out independently of each other:

- A column of NaN only is a task without test samples. Means over tasks leave it out. Its row is kept: the other tasks
  were measured then.
- A row of NaN only is a time at which nothing was measured. Maxima and means over time leave it out. The last row is
  never replaced by an earlier one: without it, all metrics of the end are NaN.

Any other missing measurement makes the results that need it NaN; nothing is ever filled in. With one task, metrics over
earlier tasks (forgetting, BWT, FWT) have no terms. They are NaN, not 0: "nothing was forgotten" would be a claim.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

# T = tasks; TT: first axis "after task", second axis "on task"
Floats = NDArray[np.float64]
Kind = Literal["chaudhry", "first", "peak"]
KINDS: tuple[Kind, ...] = ("chaudhry", "first", "peak")


def average_accuracy(accuracy_TT: ArrayLike, after: int = -1, num_examples: ArrayLike | None = None) -> float:
    """Return the mean accuracy over the tasks seen so far, ``A_k = 1/k sum_{j<=k} R[k,j]``.

    Lopez-Paz and Ranzato, "Gradient Episodic Memory", NeurIPS 2017 (ACC, for the last task). NaN where none of them has
    test samples.

    Parameters
    ----------
    accuracy_TT
        Accuracy matrix.
    after
        0-based task after which to look; the last one by default.
    num_examples
        Test samples of each task, shape (T,): the mean is then over samples, ``sum n_j R[k,j] / sum n_j``, as
        iCaRL (Rebuffi et al., CVPR 2017) reports it; equal to the task mean only when all n_j are equal.

    Raises
    ------
    ValueError
        The matrix is not square or empty, or ``num_examples`` has another length, a negative entry, or 0 for a task
        that was tested.
    """
    matrix = _matrix(accuracy_TT)
    weights = _weights(num_examples, matrix)
    row = range(len(matrix))[after]
    seen = tested_tasks(matrix) & (np.arange(len(matrix)) <= row)
    return float(np.average(matrix[row, seen], weights=weights[seen])) if seen.any() else float("nan")


def average_incremental_accuracy(accuracy_TT: ArrayLike, num_examples: ArrayLike | None = None) -> float:
    """Return ``1/T sum_k A_k``: the average accuracy, averaged over the ends of all tasks, the first included.

    Rebuffi et al., "iCaRL", CVPR 2017. ``num_examples`` as in ``average_accuracy``: None for the task mean, test
    samples of each task for the sample mean. Earlier ends without a measurement, or at which no seen task has test
    samples, are left out. Raises ``ValueError`` likewise.
    """
    matrix = _matrix(accuracy_TT)
    tested, last = tested_tasks(matrix), len(matrix) - 1
    known = [tested[: k + 1].any() and measured for k, measured in enumerate(measured_moments(matrix))]
    return float(np.mean([average_accuracy(matrix, k, num_examples) for k in range(last + 1) if known[k] or k == last]))


def tested_tasks(accuracy_TT: ArrayLike) -> NDArray[np.bool_]:
    """Return which tasks were ever measured, shape (T,). Raises ``ValueError`` for a bad matrix."""
    return np.asarray(~np.isnan(_matrix(accuracy_TT)).all(axis=0))


def measured_moments(accuracy_TT: ArrayLike) -> NDArray[np.bool_]:
    """Return after which tasks anything was measured, shape (T,). Raises ``ValueError`` for a bad matrix."""
    return np.asarray(~np.isnan(_matrix(accuracy_TT)).all(axis=1))


def forgetting_by_task(accuracy_TT: ArrayLike, kind: Kind = "chaudhry") -> Floats:
    """Return what is forgotten of each task but the last: best earlier accuracy minus final accuracy, shape (T-1,).

    The definitions differ in what "best earlier" is, with L = T-1 the last row:

    - ``chaudhry``: ``max_{j<=l<L} R[l,j]``: once learned, before the last task. May be negative.
      Chaudhry et al., "Riemannian Walk for Incremental Learning", ECCV 2018, section 3.
    - ``first``: ``R[j,j]``: just learned; the negative of BWT. May be negative. As Avalanche computes it.
    - ``peak``: ``max_l R[l,j]`` over all measured rows, the last included: never negative. As Mammoth and PyCIL do.

    A task without test samples has NaN.

    Raises
    ------
    ValueError
        The matrix is not square or empty, or the kind is unknown.
    """
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r}: must be one of {', '.join(KINDS)}")
    matrix = _matrix(accuracy_TT)
    last, measured = len(matrix) - 1, measured_moments(matrix)
    best = [_best(matrix[:, task], task, measured, kind) for task in range(last)]
    return np.asarray(best, dtype=np.float64) - matrix[last, :last]


def _best(accuracy_T: Floats, task: int, measured: NDArray[np.bool_], kind: Kind) -> float:
    """Return the best accuracy on ``task`` by a definition of forgetting; rows that were not measured are left out."""
    if kind == "first":
        return float(accuracy_T[task])
    stop = len(accuracy_T) - (kind == "chaudhry")
    since = accuracy_T[task:stop][measured[task:stop]]
    # rows from before the task was learned may be missing, later ones must not
    before = np.fmax.reduce(accuracy_T[:task], initial=-np.inf) if kind == "peak" else -np.inf
    return float(np.max(since, initial=before)) if len(since) else float("nan")


def forgetting(accuracy_TT: ArrayLike, kind: Kind = "chaudhry") -> float:
    """Return ``forgetting_by_task`` averaged over the earlier tasks with test samples; NaN without. Raises likewise."""
    return _mean(forgetting_by_task(accuracy_TT, kind)[tested_tasks(accuracy_TT)[:-1]])


def bwt(accuracy_TT: ArrayLike) -> float:
    """Return backward transfer ``1/(T-1) sum_{j<T} (R[T,j] - R[j,j])``; NaN for one task.

    Lopez-Paz and Ranzato, NeurIPS 2017, eq. 3. Raises ``ValueError`` for a matrix that is not square or empty.
    """
    matrix = _matrix(accuracy_TT)
    return _mean((matrix[-1] - np.diag(matrix))[:-1][tested_tasks(matrix)[:-1]])


def fwt(accuracy_TT: ArrayLike, baseline_T: ArrayLike | None) -> float:
    """Return forward transfer ``1/(T-1) sum_{j>=2} (R[j-1,j] - b_j)``; NaN for one task or without a baseline.

    Lopez-Paz and Ranzato, NeurIPS 2017, eq. 4.

    Parameters
    ----------
    accuracy_TT
        Accuracy matrix; its first upper diagonal (a task just before it is learned) must have been measured.
    baseline_T
        Accuracy of the model before any training on each task, shape (T,); None when it was not measured.

    Raises
    ------
    ValueError
        The matrix is not square or empty, or the baseline has another length.
    """
    matrix = _matrix(accuracy_TT)
    if baseline_T is None:
        return float("nan")
    baseline = np.asarray(baseline_T, dtype=np.float64)
    if baseline.shape != (len(matrix),):
        raise ValueError(f"baseline of shape {baseline.shape}: must have one entry for each of {len(matrix)} tasks")
    return _mean((np.diag(matrix, k=1) - baseline[1:])[tested_tasks(matrix)[1:]])


def learning_accuracy(accuracy_TT: ArrayLike) -> float:
    """Return ``1/T sum_j R[j,j]``: how well each task was learned when it came (plasticity).

    Riemer et al., "Learning to Learn without Forgetting", ICLR 2019. Raises ``ValueError`` for a bad matrix.
    """
    matrix = _matrix(accuracy_TT)
    return _mean(np.diag(matrix)[tested_tasks(matrix)])


def summarise(accuracy_TT: ArrayLike, baseline_T: ArrayLike | None = None) -> dict[str, float]:
    """Return the continual-learning headline numbers under their keys of ``summary.json``, all as task means.

    Parameters
    ----------
    accuracy_TT
        Accuracy matrix.
    baseline_T
        Accuracy before training, shape (T,), for FWT; None when it was not measured.

    Raises
    ------
    ValueError
        As the functions for each number do.
    """
    matrix = _matrix(accuracy_TT)
    return {
        "accuracy/average": average_accuracy(matrix),
        "accuracy/average_incremental": average_incremental_accuracy(matrix),
        **{f"forgetting/{kind}": forgetting(matrix, kind) for kind in KINDS},
        "bwt": bwt(matrix),
        "fwt": fwt(matrix, baseline_T),
    }


def personal(accuracy_by_client: Mapping[str, float]) -> dict[str, float]:
    """Return mean and worst tenth of the clients' accuracies under their keys of ``summary.json``.

    ``personal/accuracy_worst10`` is the mean over the ``max(1, floor(n / 10))`` clients with the lowest accuracy: the
    worst-off clients, without the noise of one extreme client when there are many. Both are NaN without clients.

    Parameters
    ----------
    accuracy_by_client
        Client id -> accuracy in [0, 1] of the model that the client would use; a NaN makes both numbers NaN.
    """
    values = np.sort(np.asarray(list(accuracy_by_client.values()), dtype=np.float64))
    # sort puts NaN last, where the worst tenth would not see it
    unknown = bool(np.isnan(values).any())
    worst = values[: max(1, len(values) // 10)]
    return {
        "personal/accuracy_mean": _mean(values),
        "personal/accuracy_worst10": float("nan") if unknown else _mean(worst),
    }


def _mean(values: Floats) -> float:
    return float(np.mean(values)) if len(values) else float("nan")


def _matrix(accuracy_TT: ArrayLike) -> Floats:
    matrix = np.asarray(accuracy_TT, dtype=np.float64)
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or not matrix.size:
        raise ValueError(f"accuracy matrix of shape {matrix.shape}: must be (T, T) with at least one task")
    return matrix


def _weights(num_examples: ArrayLike | None, matrix: Floats) -> Floats:
    if num_examples is None:
        return np.ones(len(matrix))
    weights = np.asarray(num_examples, dtype=np.float64)
    if weights.shape != (len(matrix),) or not (weights >= tested_tasks(matrix)).all():
        raise ValueError(
            f"num_examples={weights.tolist()}: must be {len(matrix)} counts >= 0, and > 0 for each task that was tested"
        )
    return weights
