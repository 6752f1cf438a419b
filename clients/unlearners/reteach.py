"""Reteaching: the client that leaves relearns what clean data teach, in directions that those who stay do not use.

A combination of known means for the removal of a client, of this project's own making. (1) A teacher that owes nothing
to the leaver: ridge regression on random ReLU features (Rahimi and Recht, NeurIPS 2007) from sums over the clients that
stay, solved exactly. (2) The leaver trains the run's model on its own inputs towards the teacher's answers; its labels
are not used. (3) Each gradient is multiplied by M = (A + eps tr(A)/D I)^-1, scaled to a mean diagonal of 1, where A is
the second moment of the layer's inputs at those who stay: a soft form of orthogonal weights modification (Zeng et al.,
Nature Machine Intelligence 2019). An edit that raises their loss is what their further rounds would undo; this one
hardly moves what they use. No state is kept before the request, and no recovery rounds are needed.
"""

# N = samples, D = inputs of a layer and its bias, F = random features and a constant, C = logit columns, P = parameters
from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from clients.unlearners.averaging import edited_targets, users_of
from clients.unlearners.sparing import (
    GRAM,
    Spared,
    add_gram,
    cholesky,
    half,
    input_sums,
    layers_of,
    random_features,
    sparing_matrices,
    total,
    whole,
)
from clients.unlearners.steps import BATCH, answered, responses_of, settings, sgd
from fedcl.contracts.fields import Form, TensorField
from fedcl.contracts.learner import LocalTraining
from fedcl.contracts.requests import ForgetRequest, Scope
from fedcl.contracts.unlearner import Local, Samples, UnlearnContext, Unlearner, UnlearnView
from fedcl.models.flat import FlatModel

if TYPE_CHECKING:
    from fedcl.contracts.strategy import LocalWork, Target
    from fedcl.contracts.view import Response

_TEACHER, _MATRIX = "teacher", "matrix"


class Reteach(Unlearner):
    """Relabel the leaver's samples by an innocent teacher, and move the model where those who stay are not looking.

    Parameters
    ----------
    features
        Random features of the teacher. More are a better teacher, and more bytes: F (F + 1) / 2 + F C numbers a client.
    ridge
        The teacher's penalty, relative to the mean energy of a feature.
    sharpness
        The teacher's answers are softmax(sharpness x scores); scores are near 1 for its class and 0 for the others.
    epsilon
        How much directions are spared: 0 would forbid those that stay in use altogether, infinity spares none.
    epochs, lr, momentum, batch_size
        Of the leaver's training; None for the client's own.
    max_steps
        Steps after which it ends all the same: what is to be unlearned does not grow with the leaver's samples. None:
        no such bound.
    max_samples
        How many samples of each client that stays are summed up, drawn at random: what a teacher of F features and a
        second moment of D inputs need does not grow with the clients' samples either. None: all.

    Raises
    ------
    ValueError
        If a number is out of its range, or (in :meth:`check`) the model has no layer whose inputs can be told.
    """

    scopes: ClassVar[frozenset[Scope]] = frozenset({"client"})

    def __init__(
        self,
        *,
        features: int = 400,
        ridge: float = 0.01,
        sharpness: float = 8.0,
        epsilon: float = 0.1,
        epochs: int = 5,
        lr: float | None = 0.04,
        momentum: float = 0.9,
        batch_size: int | None = 64,
        max_steps: int | None = 20,
        max_samples: int | None = 250,
    ) -> None:
        positive = {"features": features, "ridge": ridge, "sharpness": sharpness, "epsilon": epsilon}
        for name, value in positive.items():
            if not value > 0:
                raise ValueError(f"unlearner.{name}={value}: must be > 0")
        if max_steps is not None and max_steps < 0:
            raise ValueError(f"unlearner.max_steps={max_steps}: must be >= 0 or null")
        if max_samples is not None and max_samples < 1:
            raise ValueError(f"unlearner.max_samples={max_samples}: must be >= 1 or null")
        if epochs < 0 or not 0 <= momentum < 1:
            raise ValueError(f"unlearner: epochs={epochs} must be >= 0, momentum={momentum} in [0, 1)")
        self.features, self.ridge, self.sharpness, self.epsilon = features, ridge, sharpness, epsilon
        self.epochs, self.lr, self.momentum, self.batch_size = epochs, lr, momentum, batch_size
        self.max_steps, self.max_samples = max_steps, max_samples
        self._inputs: Form = {}
        self._metrics: dict[str, float] = {}

    def bind(self, work: LocalWork) -> None:
        """Find out which layers clients answer for, and how much each reads."""
        model = work.model.copy()
        nothing = torch.zeros(1, *work.input_shape, device=model.device)
        read = input_sums(model, Samples(nothing, torch.zeros(1, dtype=torch.long, device=model.device)))
        self._inputs = {f"{GRAM}/{layer}": TensorField(tuple(sums.shape)) for layer, sums in read.items()}

    @property
    def _teaching(self) -> Form:
        """What a client sends for the teacher."""
        width = self.features + 1
        return {GRAM: TensorField((width * (width + 1) // 2,)), "cross": TensorField((width, "columns"))}

    def check(self, model: FlatModel) -> None:
        """Refuse a model without linear layers and plain convolutions."""
        if not layers_of(model.module):
            raise ValueError("unlearner: reteach needs linear layers or 2-d convolutions with one group")

    # -- at a client --------------------------------------------------------------------------------------------------

    def local(self, ctx: UnlearnContext, step: str) -> Local:
        """Sum up what the client retains (``teacher``, ``inputs``, ``both``), or let the leaver ``relearn``."""
        if step == "relearn":
            return self._relearn(ctx) if len(ctx.forget) else Local(0, {})
        if not len(ctx.retain):
            return Local(0, {})
        samples = self._some(ctx)
        tensors = {} if step == "inputs" else self._teach(ctx, samples)
        if step != "teacher":
            tensors |= {f"{GRAM}/{layer}": sums for layer, sums in input_sums(ctx.model, samples).items()}
        return Local(len(samples), tensors)

    def _some(self, ctx: UnlearnContext) -> Samples:
        """Return at most ``max_samples`` of what the client retains."""
        count = len(ctx.retain)
        if self.max_samples is None or count <= self.max_samples:
            return ctx.retain
        chosen = torch.randperm(count, generator=ctx.rng("samples"))[: self.max_samples]
        return ctx.retain.at(chosen.to(ctx.device))

    def _teach(self, ctx: UnlearnContext, samples: Samples) -> dict[str, Tensor]:
        width = self.features + 1
        # float32 is enough: the penalty is far above its rounding
        gram, cross = (torch.zeros(width, columns, device=ctx.device) for columns in (width, ctx.num_columns))
        for batch in samples.batches(BATCH):
            phi_NF = random_features(batch.x, self.features, int(ctx.args["seed"]))
            add_gram(gram, phi_NF)
            cross.addmm_(phi_NF.T, F.one_hot(batch.y, ctx.num_columns).to(phi_NF))
        return {GRAM: half(gram), "cross": cross}

    def _relearn(self, ctx: UnlearnContext) -> Local:
        training = settings(ctx, epochs=self.epochs, lr=self.lr, batch_size=self.batch_size)
        training = replace(training, momentum=self.momentum, weight_decay=0.0)
        move = sgd(ctx.model, training)
        scores_NC = random_features(ctx.forget.x, self.features, int(ctx.args["seed"])) @ ctx.tensors[_TEACHER].to(
            ctx.device
        )
        told = Told(ctx.forget, scores_NC, self.sharpness)
        matrices = {name.partition("/")[2]: m for name, m in ctx.tensors.items() if name.startswith(f"{_MATRIX}/")}
        spared, steps = Spared(ctx.model, matrices), 0
        ctx.model.eval()
        for rows in islice(told.batches(training, ctx.rng("batches")), self.max_steps):
            move(spared.gradients(functools.partial(told.loss, ctx.model, rows)))
            steps += 1
        return answered(ctx, len(ctx.forget), steps=steps)

    # -- at the server ------------------------------------------------------------------------------------------------

    def unlearn(
        self, requests: Sequence[ForgetRequest], models: Mapping[Target, Tensor], view: UnlearnView
    ) -> dict[Target, Tensor]:
        """Let each leaver correct every model that stays, one after the other."""
        seed = int(torch.randint(2**31, (1,), generator=view.rng("random features")))
        self._metrics = {"steps": 0.0}
        teacher: Tensor | None = None
        edited: dict[Target, Tensor] = {}
        for target in edited_targets(requests, models):
            model, stay = models[target], users_of(target, models, view)
            if teacher is None:  # once, of everybody, and of what the first model reads in the same message
                sums = view.ask(
                    "both", dict.fromkeys(view.clients, model), {**self._teaching, **self._inputs}, seed=seed
                )
                teacher = self._solve(sums)
                sums = [response for response in sums if response.client in stay]
            else:
                sums = view.ask("inputs", dict.fromkeys(stay, model), self._inputs)
            if teacher is None:
                return {}
            tensors = {f"{_MATRIX}/{name}": m for name, m in sparing_matrices(sums, self.epsilon).items()}
            for departing_client in view.owners:
                responses = view.ask(
                    "relearn",
                    {departing_client: model},
                    responses_of("steps"),
                    {_TEACHER: teacher, **tensors},
                    seed=seed,
                )
                for response in responses:
                    model = (model.double() + response.tensors["change"].double()).float()
                    self._metrics["steps"] += float(response.tensors["steps"])
            edited[target] = model
        return edited

    def _solve(self, responses: Sequence[Response]) -> Tensor | None:
        """Return the teacher's weights (F, C): (S + ridge tr(S)/F I)^-1 Q of all clients' sums."""
        if not responses:
            return None
        gram, cross = whole(total(responses, GRAM)), total(responses, "cross")
        gram.diagonal().add_(self.ridge * gram.diagonal().mean())
        return torch.cholesky_solve(cross, cholesky(gram)).float()

    def metrics(self) -> dict[str, float]:
        """Return the leavers' steps in all."""
        return dict(self._metrics)


class Told:
    """The leaver's samples with the teacher's answers softmax(sharpness x scores) among the allowed columns."""

    def __init__(self, samples: Samples, scores_NC: Tensor, sharpness: float) -> None:
        self._x, self._mask = samples.x, samples.mask
        self._responses_NC = torch.softmax(self._shut(sharpness * scores_NC, samples.mask), 1)

    def batches(self, training: LocalTraining, generator: torch.Generator) -> Iterator[Tensor]:
        """Yield the positions of each batch, over all epochs."""
        for _ in range(training.epochs):
            order = torch.randperm(len(self._x), generator=generator)
            yield from torch.split(order.to(self._x.device), training.batch_size)

    def loss(self, model: FlatModel, rows: Tensor) -> Tensor:
        """Return the mean cross-entropy of ``model`` to the teacher's answers."""
        logits = self._shut(model(self._x[rows]).logits, None if self._mask is None else self._mask[rows])
        log_p = torch.log_softmax(logits, 1).masked_fill(torch.isinf(logits), 0.0)
        return -(self._responses_NC[rows] * log_p).sum(1).mean()

    @staticmethod
    def _shut(values: Tensor, mask: Tensor | None) -> Tensor:
        return values if mask is None else values.masked_fill(~mask, float("-inf"))
