"""The same training under Flower's stock simulation, as an efficient Flower app: what `fedcl.bench.flower` measures.

Samples and network stay in the actor between messages, a step is ``autograd.grad`` and one foreach update, nothing is
copied that Flower's records do not copy. Strategy, records and backend are Flower's own.
"""

from __future__ import annotations

import functools
import logging
import sys
import warnings
from collections import OrderedDict
from typing import Any, cast

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fedcl.bench.bare import weights_of
from fedcl.bench.rival import Orders
from fedcl.bench.workload import LR, Workload, order

WORKERS = 2
client_app = ClientApp()


@functools.cache
def _resident(model: str, sizes: tuple[int, ...]) -> tuple[nn.Module, Tensor, Tensor, list[Tensor]]:
    """Return network, samples, labels and every client's part: built once in each actor."""
    torch.set_num_threads(1)
    workload = Workload(model, sizes)
    data, parts = workload.dataset().train, workload.partition().train
    return workload.network(), torch.from_numpy(data.x), torch.from_numpy(data.y), [torch.from_numpy(p) for p in parts]


@functools.cache
def _samples(model: str, sizes: tuple[int, ...], client: int) -> tuple[Tensor, Tensor]:
    _, x, y, parts = _resident(model, sizes)
    return x[parts[client]], y[parts[client]]


@client_app.train()
def train(message: Message, context: Context) -> Message:
    """Train on the client's samples and return the model."""
    config = cast(dict[str, Any], message.content["config"])
    model, sizes = str(config["model"]), (int(config["size"]),) * int(config["clients"])
    client, batch_size = int(context.node_config["partition-id"]), int(config["batch-size"])
    net = _resident(model, sizes)[0]
    x, y = _samples(model, sizes, client)
    net.load_state_dict(cast(ArrayRecord, message.content["arrays"]).to_torch_state_dict())
    weights = weights_of(net)
    chosen = order(str(client), int(config["before"]) + int(config["server-round"]) - 1, len(y))
    x_shuffled, y_shuffled = x[chosen], y[chosen]
    total = 0.0
    net.train()
    for start in range(0, len(y), batch_size):
        loss = cross_entropy(net(x_shuffled[start : start + batch_size]), y_shuffled[start : start + batch_size])
        grads = torch.autograd.grad(loss, weights)
        with torch.no_grad():
            torch._foreach_add_(weights, grads, alpha=-LR)
        total += float(loss.detach())
    metrics = MetricRecord({"num-examples": len(y), "loss": total / -(-len(y) // batch_size)})
    return Message(RecordDict({"arrays": ArrayRecord(net.state_dict()), "metrics": metrics}), reply_to=message)


def serve(orders: Orders) -> None:
    """Run Flower's simulation; its server plays the rounds that are asked for."""
    from flwr.simulation import run_simulation

    workload = orders.workload
    server_app = ServerApp()

    @server_app.main()
    def main(grid: Grid, context: Context) -> None:
        count = len(workload.sizes)
        strategy = FedAvg(fraction_train=1.0, fraction_evaluate=0.0, min_train_nodes=count, min_available_nodes=count)
        arrays, played = ArrayRecord(OrderedDict(workload.network().state_dict())), 0

        def weights() -> NDArray[np.float32]:
            return np.concatenate([array.numpy().ravel() for array in arrays.values()])

        while rounds := orders.rounds(weights):
            config = ConfigRecord({
                "model": workload.model, "clients": count, "size": workload.sizes[0],
                "batch-size": workload.batch_size, "before": played,
            })  # fmt: skip
            arrays = strategy.start(grid, arrays, num_rounds=rounds, train_config=config).arrays
            played += rounds

    backend = {
        "init_args": {"num_cpus": WORKERS, "include_dashboard": False, "log_to_driver": False},
        "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
    }
    run_simulation(server_app, client_app, num_supernodes=len(workload.sizes), backend_config=cast(Any, backend))


if __name__ == "__main__":
    from fedcl.bench import flower_app  # under its real name, by which Ray's actors find the client
    from fedcl.simulation.compat import quiet_environment

    warnings.simplefilter("ignore")
    quiet_environment()
    logging.getLogger("flwr").setLevel(logging.ERROR)
    flower_app.serve(Orders(sys.argv[1:]))
