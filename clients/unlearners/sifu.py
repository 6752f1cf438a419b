"""SIFU: back to a round that the departing clients have hardly influenced, noise over their trace, and on without them.

Fraboni, Van Waerebeke, Scaman, Vidal, Kameni, Lorenzi, "SIFU: Sequential Informed Federated Unlearning for Efficient
and Provable Client Unlearning in Federated Optimization", AISTATS 2024. With weights p_i, one round without the group W
would have ended elsewhere by sum_{i in W} p_i (theta_i - theta_new) / (1 - sum_W p_i), whatever came before it moves
along by at most B = (1 - eta lambda)^K, and so Psi_W(n + 1) = B Psi_W(n) + ||...|| bounds what W has done to the model.
``docs/methods/unlearning_history.md`` lists the assumptions.
"""

# P = length of the flat vector
from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from clients.unlearners.local_rounds import LocalTasks, local_steps, run_round, train_local_task
from clients.unlearners.sensitivity import Path, Round, budget
from fedcl.contracts.learner import LocalTraining
from fedcl.contracts.requests import ErasureOutcome, ForgetRequest, Forgotten
from fedcl.contracts.unlearner import Local, UnlearnContext, Unlearner, UnlearnView

if TYPE_CHECKING:
    from fedcl.contracts.strategy import LocalWork, Target, Update
    from fedcl.contracts.view import ServerView
    from fedcl.models.flat import FlatModel, Spec

TRAIN = "train"
_ROUNDING = 1e-5  # relative: float32 means of models may differ by so much


class SIFU(Unlearner):
    """Remove clients, one request after another, within a privacy budget for each.

    Parameters
    ----------
    epsilon, delta
        The guarantee: the result cannot be distinguished from training without these clients, by (epsilon, delta).
    sigma
        Standard deviation of the noise added to every parameter.
    mechanism
        Which sensitivity ``sigma`` covers: ``classic``, Psi* = epsilon sigma / sqrt(2 ln(1.25 / delta)), the paper's,
        proven for epsilon <= 1; ``analytic``, the largest one there is (Balle and Wang, ICML 2018), for any epsilon.
    strong_convexity
        lambda of every client's loss; null: ``client.optimizer.weight_decay``. Used for convex models alone.
    retrain
        Whether the rounds that were rolled back are run again, each with the task it had; otherwise
        ``unlearning.recovery_rounds`` and the schedule's further rounds have to regain them.
    """

    scopes = frozenset({"client"})
    guarantee = "certified"
    observes = True

    def __init__(
        self,
        *,
        epsilon: float = 1.0,
        delta: float = 0.01,
        sigma: float = 0.05,
        mechanism: Literal["classic", "analytic"] = "classic",
        strong_convexity: float | None = None,
        retrain: bool = True,
    ) -> None:
        self.epsilon, self.delta, self.sigma = epsilon, delta, sigma
        self.strong_convexity, self.mechanism, self.retrain = strong_convexity, mechanism, retrain
        self.budget = budget(epsilon, delta, sigma, mechanism)
        self._training = LocalTraining()
        self._contracts = False
        self._broken: dict[str, int] = {}  # assumption -> how often it did not hold
        self._local_tasks = LocalTasks()
        self._path = Path()
        self._last: dict[str, float] = {}

    def bind(self, work: LocalWork) -> None:
        """Learn how clients train, and see whether the model's loss is convex at all."""
        self._training, self._local_tasks.stream = work.training, work.stream
        linear = is_linear(work.model, math.prod(work.input_shape))
        self._contracts = linear and work.training.momentum == 0
        if not linear:
            self._broken["the model has hidden layers, so that its loss is not convex"] = 1
        if not work.plain_loss:
            self._broken["clients minimise more than cross-entropy and weight decay"] = 1
        if self.epsilon > 1 and self.mechanism == "classic":
            self._broken["epsilon > 1, for which mechanism=classic is not proven"] = 1

    def promise(self) -> str:
        """Return (epsilon, delta), and under what assumptions; say so where one of them does not hold in this run."""
        if self._broken:
            return f"approximate: not certified in this run, as {'; '.join(sorted(self._broken))}"
        return (
            f"certified ({self.epsilon:g}, {self.delta:g}), each request by itself, provided that every client's loss "
            f"is smooth with 2 / (L + lambda) >= lr and {self._lambda:g}-strongly convex, that local batches and who "
            f"is selected do not depend on the departing clients, and that only the models are published"
        )

    @property
    def _lambda(self) -> float:
        return self._training.weight_decay if self.strong_convexity is None else self.strong_convexity

    # -- at the server ------------------------------------------------------------------------------------------------

    def observe(self, updates: Sequence[Update], before: Tensor, view: ServerView) -> None:
        """Add what each client of the round has moved the mean by."""
        if not self._path.models:
            self._path.begin(before)
        models = {update.client: update.model.double() for update in updates}
        examples = {update.client: update.num_examples for update in updates}
        new = view.global_model.double()
        total = sum(examples.values())
        mean = torch.stack([examples[client] / total * model for client, model in models.items()]).sum(0)
        if (mean - new).norm() > _ROUNDING * (1 + new.norm()):
            self._broken["the server does more than average the models of a round by samples"] = 1
        local_tasks = {update.client: self._local_tasks.take(update) for update in updates}
        self._note({c: float((m - new).norm()) for c, m in models.items()}, examples, local_tasks, new.float())

    def _note(
        self, distances: dict[str, float], examples: Mapping[str, int], local_tasks: Mapping[str, Any], new: Tensor
    ) -> None:
        total = sum(examples.values())
        steps = min(local_steps(self._training, examples[client]) for client in distances)
        factor = max(0.0, 1.0 - self._training.lr * self._lambda) ** steps if self._contracts else 1.0
        shares = {client: examples[client] / total for client in distances}
        self._path.add(Round(factor, shares, distances, dict(local_tasks)), new, self.budget)

    def unlearn(
        self, requests: Sequence[ForgetRequest], models: Mapping[Target, Tensor], view: UnlearnView
    ) -> dict[Target, Tensor]:
        """Roll back, add noise, and run the lost rounds again without the clients; every target takes the result."""
        departing_clients = Forgotten(list(requests)).clients
        if not self._path.models:
            return {}  # nobody has trained yet
        rounds, before = len(self._path.rounds), self._path.sensitivity(departing_clients)
        stored = float(sum(model.nbytes for model in self._path.models.values()))
        place = self._path.rollback_point(departing_clients, self.budget)
        psi = self._path.sensitivity(departing_clients, place)
        sigma = self.sigma if psi else 0.0  # a model that they have not touched needs no cover
        model = noisy(self._path.models[place], view.spec, sigma, view.rng("sifu"))
        lost = self._path.cut(place, model)
        self._path.drop(departing_clients)
        if self.retrain:
            for number, one in enumerate(lost):
                model = self._again(one, number, model, view)
        self._last = {
            "rounds_rolled_back": float(rounds - place),
            "sensitivity": psi,
            "sensitivity_before": min(before, 1e300),
            "budget": self.budget,
            "stored_bytes": stored,
        }
        return dict.fromkeys(models, model)

    def _again(self, lost: Round, number: int, model: Tensor, view: UnlearnView) -> Tensor:
        """Run a lost round with those of its clients that stay, and return the mean of their models."""
        local_tasks = {client: local_task for client, local_task in lost.local_tasks.items() if client in view.clients}
        trained = run_round(view, TRAIN, model, local_tasks, epochs=self._training.epochs, place=number)
        if not trained:
            return model
        examples = {client: one.num_examples for client, one in trained.items()}
        total = sum(examples.values())
        change = torch.stack([examples[c] / total * one.change for c, one in trained.items()]).sum(0)
        distances = {client: float((one.change - change).norm()) for client, one in trained.items()}
        new = (model.double() + change).float()
        self._note(distances, examples, {client: local_tasks[client] for client in trained}, new)
        return new

    def local(self, ctx: UnlearnContext, step: str) -> Local:
        if step != TRAIN:
            return super().local(ctx, step)
        return train_local_task(ctx)

    def metrics(self) -> dict[str, float]:
        """Return how far the last request went back, the clients' sensitivity there and before, and what is stored."""
        return dict(self._last)

    def forget(self, request: ForgetRequest) -> ErasureOutcome:
        """Drop the sensitivities of those who leave; models from before the rollback point keep what is within it."""
        self._path.drop(request.clients)
        for client in request.clients:
            self._local_tasks.drop(client)
        name = type(self).__name__
        if not self._path.models:
            return ErasureOutcome(name, "not applicable", "has seen no round yet")
        older = sum(0 < place < self._path.rolled_back_to for place in self._path.models)
        if older:
            why = f"{older} models of earlier rounds, on which the clients' sensitivity is within the budget"
            return ErasureOutcome(name, "retained", f"{why}: noise is added before one is used")
        return ErasureOutcome(
            name, "erased", "the clients' sensitivities, and every model from after the rollback point"
        )

    def state_dict(self) -> dict[str, Any]:
        return {"path": self._path.state(), "tasks": self._local_tasks.state(), "broken": dict(self._broken)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._path = Path.of(state["path"])
        self._local_tasks.load(state["tasks"])
        self._broken = dict(state["broken"])


def noisy(model_P: Tensor, spec: Spec, sigma: float, generator: torch.Generator) -> Tensor:
    """Return the model with normal noise on every parameter; buffers (a linear model has none) stay."""
    noise_P = sigma * torch.randn(len(model_P), generator=generator, dtype=torch.float64)
    for tensor in spec:
        if tensor.kind != "parameter":
            noise_P[tensor.start : tensor.stop] = 0.0
    return (model_P.double() + noise_P).float()


def is_linear(model: FlatModel, inputs: int) -> bool:
    """Whether every weight reads the input itself, so that cross-entropy is convex in the parameters."""
    if any(tensor.kind != "parameter" for tensor in model.spec):
        return False
    weights = [tensor for tensor in model.spec if len(tensor.shape) >= 2]
    return all(len(w.shape) == 2 and w.size // w.shape[0] == inputs for w in weights)
