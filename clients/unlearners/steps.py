"""What unlearners that move weights share at a client: local steps over samples."""

# P = length of the flat vector, N = samples, C = logit columns
from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fedcl.client.loop import masked_cross_entropy, sgd_step
from fedcl.contracts.fields import MODEL, Form, TensorField
from fedcl.contracts.learner import Batch, LocalTraining
from fedcl.contracts.unlearner import Local, Samples, UnlearnContext
from fedcl.models.flat import FlatModel

BATCH = 512  # samples at once where gradients or predictions are summed, which does not depend on it

Step = Callable[[list[Tensor]], None]  # takes the gradients of the trainable parameters


def check(
    *,
    rounds: int = 0,
    epochs: int = 0,
    lr: float | None = None,
    batch_size: int | None = None,
    optimizer: str = "sgd",
    positive: Mapping[str, float | None] | None = None,
) -> None:
    """Raise ValueError, naming the key, for a number out of its range; what is in ``positive`` must be > 0 or None."""
    for key, value, right, rule in (
        ("rounds", rounds, rounds >= 0, ">= 0"),
        ("epochs", epochs, epochs >= 0, ">= 0"),
        ("lr", lr, lr is None or lr >= 0, ">= 0 or null"),
        ("batch_size", batch_size, batch_size is None or batch_size >= 1, ">= 1 or null"),
        ("optimizer", optimizer, optimizer in ("adam", "sgd"), "adam or sgd"),
        *((key, value, value is None or value > 0, "> 0 or null") for key, value in (positive or {}).items()),
    ):
        if not right:
            raise ValueError(f"unlearner.{key}={value}: must be {rule}")


def cross_entropy(model: FlatModel, batch: Batch) -> Tensor:
    """Return the mean cross-entropy of ``model`` on ``batch`` over the allowed columns."""
    return masked_cross_entropy(model(batch.x), batch)


def gradients(model: FlatModel, loss: Tensor) -> list[Tensor]:
    """Return the gradients of ``loss`` for the trainable parameters, zero where it does not depend on one."""
    return list(torch.autograd.grad(loss, model.trainable, materialize_grads=True))


@torch.no_grad()
def clip(grads: list[Tensor], max_norm: float | None) -> None:
    """Scale ``grads`` in place so that their joint L2 norm is at most ``max_norm``; None leaves them as they are."""
    if max_norm is None:
        return
    norm = float(torch.stack([torch.linalg.vector_norm(g.double()) for g in grads]).norm())
    if norm > max_norm:
        torch._foreach_mul_(grads, max_norm / norm)


def settings(
    ctx: UnlearnContext, *, epochs: int | None = None, lr: float | None = None, batch_size: int | None = None
) -> LocalTraining:
    """Return how the client trains, with what is not None in place of its own settings."""
    own = ctx.training
    return replace(
        own,
        epochs=own.epochs if epochs is None else epochs,
        lr=own.lr if lr is None else lr,
        batch_size=own.batch_size if batch_size is None else batch_size,
    )


def sgd(model: FlatModel, training: LocalTraining) -> Step:
    """Return steps of SGD as in training: momentum and weight decay of ``training``, velocity zero at first."""
    params: list[Tensor] = list(model.trainable)
    velocity: list[Tensor] | None = None

    def step(grads: list[Tensor]) -> None:
        nonlocal velocity
        velocity = sgd_step(params, grads, velocity, training)

    return step


class Adam:
    """Adam's steps, with bias correction (Kingma and Ba, "Adam: A Method for Stochastic Optimization", ICLR 2015).

    m <- b1 m + (1 - b1) g; v <- b2 v + (1 - b2) g^2; w <- w - lr m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps). The
    first step is lr g / (abs(g) + eps): a sign, wherever the gradient is not next to nothing.
    """

    def __init__(
        self, params: Sequence[Tensor], lr: float, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8
    ) -> None:
        self._params, self._lr, self._betas, self._eps = list(params), lr, betas, eps
        self._mean = [torch.zeros_like(p) for p in params]
        self._square = [torch.zeros_like(p) for p in params]
        self._step = 0

    @torch.no_grad()
    def __call__(self, grads: list[Tensor]) -> None:
        """Move the parameters in place."""
        self._step += 1
        first, second = self._betas
        for p, g, m, v in zip(self._params, grads, self._mean, self._square, strict=True):
            m.lerp_(g, 1 - first)
            v.mul_(second).addcmul_(g, g, value=1 - second)
            scale = (v / (1 - second**self._step)).sqrt_().add_(self._eps)
            p.addcdiv_(m, scale, value=-self._lr / (1 - first**self._step))


def optimizer(name: str, model: FlatModel, training: LocalTraining) -> Step:
    """Return the steps of ``adam``, or of ``sgd`` as in training."""
    return Adam(model.trainable, training.lr) if name == "adam" else sgd(model, training)


def epochs_of(ctx: UnlearnContext, samples: Samples, training: LocalTraining) -> Iterable[Batch]:
    """Yield the batches of ``training.epochs`` epochs, in an order of its own for each round of the same request."""
    generator = ctx.rng(f"batches {ctx.args.get('round', 0)}")
    for _ in range(training.epochs):
        yield from samples.batches(training.batch_size, generator)


def descend(model: FlatModel, batches: Iterable[Batch], step: Step) -> int:
    """Move ``model`` down the cross-entropy of each batch; return the number of steps."""
    steps = 0
    model.train()
    for batch in batches:
        step(gradients(model, cross_entropy(model, batch)))
        steps += 1
    return steps


@torch.no_grad()
def accuracy(model: FlatModel, samples: Samples) -> float:
    """Return the share of ``samples`` (at least one) whose highest allowed column is their target."""
    model.eval()
    hits = 0
    for batch in samples.batches(BATCH):
        logits = model(batch.x).logits
        if batch.mask is not None:
            logits = logits.masked_fill(~batch.mask, float("-inf"))
        hits += int((logits.argmax(1) == batch.y).sum())
    return hits / len(samples)


def allowed(samples: Samples, num_columns: int) -> Tensor:
    """Return which columns each sample may be given, bool (N, C)."""
    if samples.mask is not None:
        return samples.mask
    return torch.ones(len(samples), num_columns, dtype=torch.bool, device=samples.y.device)


def ignorance(batch: Batch, num_columns: int) -> float:
    """Return the cross-entropy of a uniform guess among the allowed columns: the mean of log C over the batch."""
    columns = torch.full((1,), num_columns) if batch.mask is None else batch.mask.sum(1)
    return float(columns.double().log().mean())


@torch.no_grad()
def project(model: FlatModel, centre: Tensor, radius: float) -> None:
    """Move the parameters of ``model`` to the nearest point of the L2 ball around ``centre`` (P,)."""
    own, middle = model.flat[: model.num_parameters], centre[: model.num_parameters]
    apart = own.double() - middle.double()
    norm = float(apart.norm())
    if norm > radius:
        own.copy_(middle.double() + apart * (radius / norm))


CHANGE: Form = {"change": MODEL}


def responses_of(*numbers: str) -> Form:
    """Return what :func:`answered` gives with ``numbers`` of these names, each at least 0."""
    return {**CHANGE, **{name: TensorField((1,), low=0.0) for name in numbers}}


def answered(ctx: UnlearnContext, num_examples: int, **numbers: float) -> Local:
    """Return the change of ``ctx.model`` since it was received, and ``numbers`` for the certificate."""
    tensors = {name: torch.tensor([float(value)]) for name, value in numbers.items()}
    return Local(num_examples, {"change": ctx.model.flat - ctx.received, **tensors})
