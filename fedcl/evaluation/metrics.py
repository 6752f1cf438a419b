"""Continual-learning numbers computed from one accuracy matrix, and the numbers of personal models.

Throughout, ``accuracy_TT[i, j]`` in [0, 1] is the test accuracy on task j after the stream has finished task i, NaN
where it was not measured. A measurement that a formula needs and that is missing makes the result NaN; nothing is ever
filled in. Numbers over earlier tasks (forgetting, BWT, FWT) have no terms when there is one task: they are NaN, not 0,
because "nothing was forgotten" would be a claim.
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

    Lopez-Paz and Ranzato, "Gradient Episodic Memory", NeurIPS 2017 (ACC, for the last task).

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
        The matrix is not square or empty, or ``num_examples`` has another length, a negative entry, or 0 for the first
        task.
    """
    matrix = _matrix(accuracy_TT)
    weights = _weights(num_examples, len(matrix))
    seen = range(len(matrix))[after] + 1
    return float(np.average(matrix[seen - 1, :seen], weights=weights[:seen]))


def average_incremental_accuracy(accuracy_TT: ArrayLike, num_examples: ArrayLike | None = None) -> float:
    """Return ``1/T sum_k A_k``: the average accuracy, averaged over the ends of all tasks, the first included.

    Rebuffi et al., "iCaRL", CVPR 2017. ``num_examples`` as in ``average_accuracy``: None for the task mean, test
    samples of each task for the sample mean. Raises ``ValueError`` likewise.
    """
    matrix = _matrix(accuracy_TT)
    return float(np.mean([average_accuracy(matrix, k, num_examples) for k in range(len(matrix))]))


def forgetting_by_task(accuracy_TT: ArrayLike, kind: Kind = "chaudhry") -> Floats:
    """Return what is forgotten of each task but the last: best earlier accuracy minus final accuracy, shape (T-1,).

    The definitions differ in what "best earlier" is, with L = T-1 the last row:

    - ``chaudhry``: ``max_{j<=l<L} R[l,j]``: once learned, before the last task. May be negative.
      Chaudhry et al., "Riemannian Walk for Incremental Learning", ECCV 2018, section 3.
    - ``first``: ``R[j,j]``: just learned; the negative of BWT. May be negative. As Avalanche computes it.
    - ``peak``: ``max_l R[l,j]`` over all measured rows, the last included: never negative. As Mammoth and PyCIL do.

    Raises
    ------
    ValueError
        The matrix is not square or empty, or the kind is unknown.
    """
    matrix = _matrix(accuracy_TT)
    last = len(matrix) - 1
    earlier = range(last)
    if kind == "chaudhry":
        best = [np.max(matrix[j:last, j]) for j in earlier]
    elif kind == "first":
        best = [matrix[j, j] for j in earlier]
    elif kind == "peak":
        # rows from before the task was learned count where they were measured; from then on they must have been
        best = [np.max(matrix[j:, j], initial=np.fmax.reduce(matrix[:j, j], initial=-np.inf)) for j in earlier]
    else:
        raise ValueError(f"kind={kind!r}: must be one of {', '.join(KINDS)}")
    return np.asarray(best, dtype=np.float64) - matrix[last, :last]


def forgetting(accuracy_TT: ArrayLike, kind: Kind = "chaudhry") -> float:
    """Return ``forgetting_by_task`` averaged over the T-1 earlier tasks; NaN for one task. Raises likewise."""
    return _mean(forgetting_by_task(accuracy_TT, kind))


def bwt(accuracy_TT: ArrayLike) -> float:
    """Return backward transfer ``1/(T-1) sum_{j<T} (R[T,j] - R[j,j])``; NaN for one task.

    Lopez-Paz and Ranzato, NeurIPS 2017, eq. 3. Raises ``ValueError`` for a matrix that is not square or empty.
    """
    matrix = _matrix(accuracy_TT)
    return _mean((matrix[-1] - np.diag(matrix))[:-1])


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
    return _mean(np.diag(matrix, k=1) - baseline[1:])


def learning_accuracy(accuracy_TT: ArrayLike) -> float:
    """Return ``1/T sum_j R[j,j]``: how well each task was learned when it came (plasticity).

    Riemer et al., "Learning to Learn without Forgetting", ICLR 2019. Raises ``ValueError`` for a bad matrix.
    """
    return float(np.mean(np.diag(_matrix(accuracy_TT))))


def summarise(accuracy_TT: ArrayLike, baseline_T: ArrayLike | None = None) -> dict[str, float]:
    """Return the continual-learning headline numbers under their keys of ``summary.json``, all as task means.

    Tasks that were never measured, because they have no test samples, are left out with their rows.

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
    # a task without test samples is measured by nobody: its row is one more look at the others
    measured = ~np.isnan(matrix).all(axis=0)
    if measured.any():
        matrix = matrix[np.ix_(measured, measured)]
        baseline_T = None if baseline_T is None else np.asarray(baseline_T, dtype=np.float64)[measured]
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
    few who are served worst, without the noise of one extreme client when there are many. Both are NaN without clients.

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


def _weights(num_examples: ArrayLike | None, num_tasks: int) -> Floats:
    if num_examples is None:
        return np.ones(num_tasks)
    weights = np.asarray(num_examples, dtype=np.float64)
    # the first task is a prefix of its own, so it needs samples too
    if weights.shape != (num_tasks,) or (weights < 0).any() or not weights[0] > 0:
        raise ValueError(f"num_examples={weights.tolist()}: must be {num_tasks} counts >= 0, the first one > 0")
    return weights
