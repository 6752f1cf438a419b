"""Reteaching: the departing client relearns what clean data teach, in directions that remaining clients do not use.

A combination of known methods for the removal of a client, designed in this project. (1) A teacher without any data of
the departing client: ridge regression on random ReLU features (Rahimi and Recht, NeurIPS 2007) from sums over the
remaining clients, solved exactly. (2) The departing client trains the run's model on its own inputs towards the
teacher's predictions; its labels are not used. (3) Each gradient is multiplied by M = (A + eps tr(A)/D I)^-1, scaled to
a mean diagonal of 1, where A is the second moment of the layer's inputs at those who stay: a soft form of orthogonal
weights modification (Zeng et al., Nature Machine Intelligence 2019). An edit that raises their loss is what their
further rounds would undo; this one hardly moves what they use. No state is kept before the request, and no recovery
rounds are needed.
"""

# N = samples, D = inputs of a layer and its bias, F = random features and a constant, C = logit columns, P = parameters
from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from clients.unlearners.averaging import edited_targets, summed, users_of
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
    whole,
)
from clients.unlearners.steps import BATCH, change_of, responses_of, settings, sgd
from fedcl.contracts.fields import Form, TensorField
from fedcl.contracts.requests import ForgetRequest, Scope
from fedcl.contracts.unlearner import Local, Samples, UnlearnContext, Unlearner, UnlearnView
from fedcl.evaluation.predictions import masked
from fedcl.models.flat import FlatModel

if TYPE_CHECKING:
    from fedcl.contracts.strategy import LocalWork, Target
    from fedcl.contracts.view import Response

_TEACHER, _MATRIX = "teacher", "matrix"


@dataclass(kw_only=True, eq=False, repr=False)
class Reteach(Unlearner):
    """Relabel the departing client's samples by a clean teacher, and spare the directions that the others use.

    Parameters
    ----------
    features
        Random features of the teacher. More are a better teacher, and more bytes: F (F + 1) / 2 + F C numbers a client.
    ridge
        The teacher's penalty, relative to the mean energy of a feature.
    sharpness
        The teacher predicts softmax(sharpness x scores); scores are near 1 for its class and 0 for the others.
    epsilon
        How much directions are spared: 0 would forbid those that stay in use altogether, infinity spares none.
    epochs, lr, momentum, batch_size
        Of the departing client's training; None for the client's own.
    max_steps
        The largest number of steps, as what is to be unlearned does not grow with the client's samples; None for no
        bound.
    max_samples
        How many samples of each client that stays are summed up, drawn at random: what a teacher of F features and a
        second moment of D inputs need does not grow with the clients' samples either. None: all.

    Raises
    ------
    ValueError
        In :meth:`check`, if the model has no linear layers or plain convolutions.
    """

    scopes: ClassVar[frozenset[Scope]] = frozenset({"client"})

    features: int = 400
    ridge: float = 0.01
    sharpness: float = 8.0
    epsilon: float = 0.1
    epochs: int = 5
    lr: float | None = 0.04
    momentum: float = 0.9
    batch_size: int | None = 64
    max_steps: int | None = 20
    max_samples: int | None = 250

    def __post_init__(self) -> None:
        self._inputs: Form = {}
        self._metrics: dict[str, float] = {}

    def bind(self, work: LocalWork) -> None:
        """Find out for which layers clients send sums, and how many inputs each has."""
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
        """Sum up what the client retains (``teacher``, ``inputs``, ``both``), or ``relearn``."""
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
        changes = {"epochs": self.epochs, "lr": self.lr, "batch_size": self.batch_size, "momentum": self.momentum}
        training = settings(ctx, **changes, weight_decay=0.0)
        move = sgd(ctx.model, training)
        scores_NC = random_features(ctx.forget.x, self.features, int(ctx.args["seed"])) @ ctx.tensors[_TEACHER].to(
            ctx.device
        )
        taught, draws = Taught(ctx.forget, scores_NC, self.sharpness), ctx.rng("batches")
        batches = (rows for _ in range(training.epochs) for rows in ctx.forget.drawn(training.batch_size, draws))
        matrices = {name.partition("/")[2]: m for name, m in ctx.tensors.items() if name.startswith(f"{_MATRIX}/")}
        spared, steps = Spared(ctx.model, matrices), 0
        ctx.model.eval()
        for rows in islice(batches, self.max_steps):
            move(spared.gradients(functools.partial(taught.loss, ctx.model, rows)))
            steps += 1
        return change_of(ctx, len(ctx.forget), steps=steps)

    # -- at the server ------------------------------------------------------------------------------------------------

    def unlearn(
        self, requests: Sequence[ForgetRequest], models: Mapping[Target, Tensor], view: UnlearnView
    ) -> dict[Target, Tensor]:
        """Let each departing client correct every model that stays, one after the other."""
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
        sums = summed(responses)
        gram, cross = whole(sums[GRAM]), sums["cross"]
        gram.diagonal().add_(self.ridge * gram.diagonal().mean())
        return torch.cholesky_solve(cross, cholesky(gram)).float()

    def metrics(self) -> dict[str, float]:
        """Return the departing clients' steps in all."""
        return dict(self._metrics)


class Taught:
    """The departing client's samples, with the teacher's softmax(sharpness x scores) among the allowed columns."""

    def __init__(self, samples: Samples, scores_NC: Tensor, sharpness: float) -> None:
        self._samples = samples
        self._responses_NC = torch.softmax(masked(sharpness * scores_NC, samples.mask), 1)

    def loss(self, model: FlatModel, rows: Tensor) -> Tensor:
        """Return the mean cross-entropy of ``model`` to the teacher's predictions."""
        part = self._samples.at(rows)
        logits = masked(model(part.x).logits, part.mask)
        log_p = torch.log_softmax(logits, 1).masked_fill(torch.isinf(logits), 0.0)
        return -(self._responses_NC[rows] * log_p).sum(1).mean()
