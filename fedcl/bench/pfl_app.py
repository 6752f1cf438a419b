"""The same training under pfl-research's simulation: what `fedcl.bench.pfl` measures, in a process that has pfl.

Samples are tensors that stay in memory, the cohort is everybody, evaluation is off; algorithm, model, backend and
optimizers are pfl's own.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fedcl.bench.rival import Orders
from fedcl.bench.workload import LR, Workload, flat, order


class _Trained(nn.Module):
    """The network with the two functions that pfl asks a module for."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def loss(self, x: Tensor, y: Tensor, eval: bool = False) -> Tensor:
        """Return the mean cross-entropy of a batch."""
        return cross_entropy(self.net(x), y)

    def metrics(self, x: Tensor, y: Tensor, eval: bool = False) -> dict[str, Any]:
        """Return nothing: evaluation is off."""
        return {}


class _Visits:
    """Makes a client's dataset for its next visit: its samples in the order in which fedcl shows them."""

    def __init__(self, workload: Workload) -> None:
        data, parts = workload.dataset().train, workload.partition().train
        self._x = [torch.from_numpy(data.x[part]) for part in parts]
        self._y = [torch.from_numpy(data.y[part]) for part in parts]
        self._visits = [0] * len(parts)

    def __call__(self, client: str) -> Any:
        """Return the dataset."""
        from pfl.data.dataset import Dataset

        number = int(client)
        chosen = order(client, self._visits[number], len(self._y[number]))
        self._visits[number] += 1
        return Dataset(raw_data=(self._x[number][chosen], self._y[number][chosen]), user_id=client)


def _pause(orders: Orders, module: nn.Module, left: int) -> Any:
    """Return a callback that waits for orders after ``left`` rounds, and ends the run when no more come."""
    from pfl.callback.base import TrainingProcessCallback
    from pfl.metrics import Metrics

    class Pause(TrainingProcessCallback):  # type: ignore[misc]  # pfl has no types to see here
        def after_central_iteration(
            self, aggregate_metrics: Any, model: Any, *, central_iteration: int
        ) -> tuple[bool, Any]:
            nonlocal left
            left -= 1
            if not left:
                left = orders.rounds(lambda: flat(module).numpy())
            return not left, Metrics()

    return Pause()


def serve(orders: Orders) -> None:
    """Run pfl's federated averaging; after each stretch of rounds it waits for the next one."""
    from pfl.aggregate.simulate import SimulatedBackend
    from pfl.algorithm.base import NNAlgorithmParams
    from pfl.algorithm.federated_averaging import FederatedAveraging
    from pfl.data.federated_dataset import FederatedDataset
    from pfl.data.sampling import MinimizeReuseUserSampler
    from pfl.hyperparam.base import NNTrainHyperParams
    from pfl.model.pytorch import PyTorchModel

    torch.set_num_threads(1)
    workload = orders.workload
    module = _Trained(workload.network())
    left = orders.rounds(lambda: flat(module).numpy())
    if not left:
        return
    model = PyTorchModel(module, torch.optim.SGD, torch.optim.SGD(module.parameters(), lr=1.0))
    users = FederatedDataset(_Visits(workload), MinimizeReuseUserSampler(list(workload.clients)))
    algorithm = NNAlgorithmParams(
        central_num_iterations=1_000_000, evaluation_frequency=1_000_000,
        train_cohort_size=len(workload.sizes), val_cohort_size=0,
    )  # fmt: skip
    local = NNTrainHyperParams(
        local_num_epochs=workload.epochs, local_learning_rate=LR, local_batch_size=workload.batch_size
    )
    backend = SimulatedBackend(training_data=users, val_data=users)
    pause = _pause(orders, module, left)
    FederatedAveraging().run(algorithm, backend, model, local, callbacks=[pause], send_metrics_to_platform=False)


if __name__ == "__main__":
    serve(Orders(sys.argv[1:]))
