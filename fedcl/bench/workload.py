"""What is trained in every measurement of speed: networks, random data, and how they are dealt to clients.

Nothing here needs more than torch and numpy, so that other simulators' processes can build the very same.
"""

# K = clients, N = samples of a client, P = parameters
from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from fedcl.base.randomness import key, numpy_generator, torch_generator
from fedcl.config.value_rules import ConfigError
from fedcl.data.dataset import ArrayDataset, Dataset, Partition
from fedcl.models.networks import MLP, LeNet, Network, build_model
from fedcl.models.resnet import ResNet

SEED, CLASSES, LR = 0, 10, 0.05
FULL = 2000  # samples that there are at most of each client's number: further clients hold the same ones again


@dataclass(frozen=True)
class Model:
    """A network: the shape of its samples, its settings in fedcl, and rounds a repetition that take a second or so."""

    shape: tuple[int, ...]
    overrides: tuple[str, ...]
    build: Callable[[tuple[int, ...]], Network]
    rounds: int


def _resnet8(shape: tuple[int, ...]) -> Network:
    return ResNet(input_shape=shape, heads=(CLASSES,), blocks=(1, 1, 1), width=16, stem="small", norm="group", groups=8)


MODELS: Mapping[str, Model] = {
    "logistic": Model(
        (60,), ("model=mlp", "model.hidden=[]"), lambda s: MLP(input_shape=s, heads=(CLASSES,), hidden=()), 20
    ),
    "mlp": Model(
        (784,), ("model=mlp", "model.hidden=[200]"), lambda s: MLP(input_shape=s, heads=(CLASSES,), hidden=(200,)), 6
    ),
    "lenet": Model((1, 32, 32), ("model=lenet",), lambda s: LeNet(input_shape=s, heads=(CLASSES,)), 3),
    "resnet8": Model(
        (3, 32, 32), ("model=resnet8", "model.width=16", "model.stem=small", "model.norm=group", "model.groups=8"),
        _resnet8, 1,
    ),
}  # fmt: skip


def known(model: str) -> str:
    """Return ``model``.

    Raises
    ------
    ConfigError
        If it is none of `MODELS`.
    """
    if model not in MODELS:
        raise ConfigError(f"--model {model}: must be one of {', '.join(MODELS)}")
    return model


@dataclass(frozen=True)
class Workload:
    """A population that trains one model: ``sizes`` samples at each client, in batches, by plain SGD."""

    model: str
    sizes: tuple[int, ...] = (200,) * 50
    batch_size: int = 20
    epochs: int = 1

    @property
    def clients(self) -> tuple[str, ...]:
        """Names of the clients."""
        return tuple(str(k) for k in range(len(self.sizes)))

    @property
    def steps(self) -> int:
        """Optimizer steps that all clients take together in a round."""
        return self.epochs * sum(-(-size // self.batch_size) for size in self.sizes)

    @property
    def rounds(self) -> int:
        """Rounds of a repetition."""
        return MODELS[self.model].rounds

    def overrides(self) -> list[str]:
        """Return the settings of a run of fedcl that trains this."""
        return [
            *MODELS[self.model].overrides, "scenario=joint", "data/partition=iid", f"seed={SEED}",
            f"num_clients={len(self.sizes)}", f"client.batch_size={self.batch_size}", f"client.epochs={self.epochs}",
            f"client.optimizer.lr={LR}", "rounds_per_task=100000", "evaluation.every=0", "learner=finetune",
            "compare_with=null", "figures=false", "checkpoint.every=0",
        ]  # fmt: skip

    def dataset(self) -> Dataset:
        """Return the samples: classes around random centres, enough of them to be told apart only by training."""
        shape = MODELS[self.model].shape
        count = min(sum(self.sizes), FULL * CLASSES)
        rng = numpy_generator("bench", self.model)
        labels = np.arange(count, dtype=np.int64) % CLASSES
        centres = rng.standard_normal((CLASSES, *shape), dtype=np.float32)
        samples = rng.standard_normal((count, *shape), dtype=np.float32)
        samples += 0.2 * centres[labels]
        train, test = ArrayDataset(samples, labels), ArrayDataset(samples[:CLASSES], labels[:CLASSES])
        return Dataset(train, test, tuple(str(k) for k in range(CLASSES)))

    def partition(self) -> Partition:
        """Return one stretch of the samples for each client; where they are at an end, it begins again."""
        count = min(sum(self.sizes), FULL * CLASSES)
        ends = np.cumsum(self.sizes)
        parts = tuple(np.arange(end - size, end) % count for end, size in zip(ends, self.sizes, strict=True))
        return Partition(parts, tuple(np.arange(0) for _ in self.sizes))

    def network(self) -> nn.Module:
        """Return the network with fedcl's initial weights, as anyone would write it: samples in, logits out."""
        model = MODELS[self.model]
        own = build_model(lambda: model.build(model.shape), seed=key(SEED, "model"))
        net = plain(self.model, own)
        with torch.no_grad():
            for mine, theirs in zip(net.parameters(), own.parameters(), strict=True):
                mine.copy_(theirs)
        return net


class _Logits(nn.Module):
    def __init__(self, network: Network) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.network(x).logits
        return logits


def plain(name: str, network: Network) -> nn.Module:
    """Return a network of torch's own layers, its parameters in the order of ``network``'s; ResNets are taken as is."""
    shapes = [tuple(p.shape) for p in network.parameters()]
    if name == "resnet8":
        return _Logits(network)
    if name == "lenet":
        convs = [nn.Conv2d(shape[1], shape[0], shape[2]) for shape in shapes[0:4:2]]
        body = [layer for conv in convs for layer in (conv, nn.ReLU(), nn.MaxPool2d(2))]
        return nn.Sequential(*body, nn.Flatten(), *_linears(shapes[4:]))
    return nn.Sequential(nn.Flatten(), *_linears(shapes))


def _linears(shapes: Sequence[tuple[int, ...]]) -> list[nn.Module]:
    layers: list[nn.Module] = []
    for shape in shapes[::2]:
        layers += [nn.Linear(shape[1], shape[0]), nn.ReLU()]
    return layers[:-1]


def order(client: str, visit: int, count: int) -> Tensor:
    """Return the order in which fedcl shows a client its samples in its first epoch of a visit."""
    return torch.randperm(count, generator=torch_generator(SEED, client, visit, "batches"))


def flat(net: nn.Module) -> Tensor:
    """Return the weights (P,)."""
    return torch.cat([p.detach().flatten() for p in net.parameters()])
