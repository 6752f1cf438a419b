"""The same experiment in plain PyTorch, without fedcl's server and clients: a second opinion on what the numbers mean.

    FEDCL_DATA=... python benchmarks/fot_permuted_fashion/plain.py

Writes plain.json. One run of this noisy setting says little; this gives the spread over seeds that the published code's
single run lacks. Follows the published order of things: clients train, sketch with their own models in training mode,
the server averages, projects, then extends its bases. Only the data source is fedcl's.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from fedcl.data.sources import idx

TASKS, ROUNDS, CLIENTS, BATCH, LR, DECAY, EPSILON = 5, 12, 10, 16, 0.1, 1e-5, 0.96
WEIGHTS = (0, 3, 6, 9)  # positions of the linear layers


def network() -> nn.Sequential:
    """Return the published network for permuted MNIST."""
    layers: list[nn.Module] = []
    for inputs, drop in ((784, 0.2), (400, 0.5), (400, 0.5)):
        layers += [nn.Linear(inputs, 400), nn.ReLU(), nn.Dropout(drop)]
    return nn.Sequential(*layers, nn.Linear(400, 10))


def train(model: nn.Sequential, x: Tensor, y: Tensor) -> None:
    """Do one local epoch."""
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=LR, weight_decay=DECAY)
    order = torch.randperm(len(x))
    for chosen in torch.split(order, BATCH):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[chosen]), y[chosen]).backward()
        optimizer.step()


@torch.no_grad()
def sketches(model: nn.Sequential, x: Tensor, bases: dict[int, Tensor]) -> dict[int, tuple[Tensor, float]]:
    """Return each layer's sketch and ratio of norms; the model stays in training mode."""
    found, h = {}, x
    inputs = {0: x}
    for position, layer in enumerate(model):
        h = layer(h)
        if isinstance(layer, nn.ReLU):
            inputs[position + 2] = h  # before its dropout
    for position, read in inputs.items():
        a = read.T
        r = a - bases[position] @ (bases[position].T @ a) if position in bases else a
        g = torch.rand(a.shape[1], a.shape[0]) * 2 - 1
        found[position] = (r @ g, float(r.norm() / a.norm()))
    return found


def extend(bases: dict[int, Tensor], responses: list[dict[int, tuple[Tensor, float]]]) -> None:
    """Add principal directions of the summed sketches to the bases."""
    for position in WEIGHTS:
        ratio = float(np.mean([response[position][1] for response in responses]))
        left, singular, _ = torch.linalg.svd(sum((a[position][0] for a in responses[1:]), responses[0][position][0]))
        held = singular.square().cumsum(0) / singular.square().sum()
        new = left[:, : int((held <= 1 - (1 - EPSILON) / ratio).sum()) + 1]
        joined = torch.cat([bases[position], new], 1) if position in bases else new
        bases[position] = torch.linalg.qr(joined)[0]


def run_round(server: nn.Sequential, data: list[tuple[Tensor, Tensor]], bases: dict[int, Tensor], ends: bool) -> None:
    """Train all clients, average, project, and extend the bases where a task ends."""
    client, total, responses = network(), {}, []
    for x, y in data:
        client.load_state_dict(server.state_dict())
        train(client, x, y)
        if ends:
            responses.append(sketches(client, x, bases))
        for name, value in client.state_dict().items():
            total[name] = total[name] + value / CLIENTS if name in total else value / CLIENTS
    new = {}
    for name, value in server.state_dict().items():
        change, position = total[name] - value, int(name.split(".")[0])
        if name.endswith("weight") and position in bases:
            change = change - (change @ bases[position]) @ bases[position].T
        new[name] = value + change
    server.load_state_dict(new)
    if ends:
        extend(bases, responses)


def run_row(seed: int, projects: bool) -> dict[str, object]:
    """Run all tasks; return accuracy and forgetting in percent, and the ranks."""
    source = idx(root="fashion_mnist", train_limit=5000, mean=[0.1307], std=[0.3081])
    halves = [
        (torch.from_numpy(source.normalise(h.x)).flatten(1), torch.from_numpy(h.y)) for h in (source.train, source.test)
    ]
    (x_train, y_train), (x_test, y_test) = halves
    torch.manual_seed(seed)
    server, bases, matrix, ranks = network(), {}, np.zeros((TASKS, TASKS)), []
    permutations = []
    for task in range(TASKS):
        rng = np.random.default_rng((seed, task))
        permutations.append(rng.permutation(784) if task else np.arange(784))
        parts = np.array_split(rng.permutation(len(x_train)), CLIENTS)
        x = x_train[:, permutations[task]]
        for server_round in range(ROUNDS):
            ends = projects and server_round == ROUNDS - 1 and task < TASKS - 1
            run_round(server, [(x[part], y_train[part]) for part in parts], bases, ends)
        ranks.append([bases[position].shape[1] for position in WEIGHTS if position in bases])
        server.eval()
        with torch.no_grad():
            for earlier in range(task + 1):
                right = server(x_test[:, permutations[earlier]]).argmax(1) == y_test
                matrix[task, earlier] = 100 * float(right.float().mean())
    lost = np.mean(np.diag(matrix)[:-1] - matrix[-1, :-1])
    return {
        "accuracy": float(matrix[-1].mean()),
        "forgetting": float(lost),
        "learning": float(np.diag(matrix).mean()),
        "ranks": [rank for rank in ranks[:-1] if rank],
    }


def main() -> None:
    """Play the seeds and write plain.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("plain.json"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    results: dict[str, dict[str, object]] = {}
    for name, projects in (("fot", True), ("fedavg", False)):
        for seed in args.seeds:
            results.setdefault(name, {})[str(seed)] = run_row(seed, projects)
            print(name, seed, results[name][str(seed)], flush=True)
            args.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
