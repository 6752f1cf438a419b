"""FOT: every change of the model stays orthogonal to the layer inputs of earlier tasks.

Bakman, Yaldiz, Ezzeldin, Avestimehr, "Federated Orthogonal Training: Mitigating Global Catastrophic Forgetting in
Continual Federated Learning", ICLR 2024: FedProject (:meth:`FOT.apply`) and global principal subspace extraction
(:meth:`FOT.queries`, :meth:`FOT.absorb`). ``docs/methods/fot.md`` tells the two variants apart.
"""

# P = parameters, D = inputs of a layer, K = rank of its basis, Q = columns of a sketch, N = new directions
from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from fedcl.linalg import extend_basis, gram_spectrum, leading, project_out, project_out_gram, sketch_spectrum
from fedcl.models.flat import Spec, TensorSpec
from fedcl.requests import ForgetRequest, Residual
from fedcl.server.contracts import Answer, Event, Projection, Query, ServerView, Target

SUBSPACE = "subspace"
Variant = Literal["official", "corrected"]
Method = Literal["auto", "gram", "sketch"]


def directions_official(sketch_DQ: Tensor, ratio: float, epsilon: float) -> Tensor:
    """Return the directions (D, N) that the published code adds for a sketch of the residual inputs.

    N is the smallest count whose share of the sketch's energy exceeds 1 - (1 - epsilon) / ratio, and at least 1;
    ``ratio`` is the norm of the residual over the norm of the inputs. None for a sketch of zeros.
    """
    if ratio <= 0 or not bool(sketch_DQ.any()):
        return sketch_DQ[:, :0]
    energies, directions = sketch_spectrum(sketch_DQ)
    return directions[:, : leading(energies, 1 - (1 - epsilon) / ratio, strict=True)]


def directions_corrected(energies: Tensor, directions_DM: Tensor, outside: float, epsilon: float) -> Tensor:
    """Return the directions (D, N) without which less than ``epsilon`` of the inputs' energy would be kept.

    ``energies`` (M,) and ``directions_DM`` are the spectrum of the residual, ``outside`` its share of the inputs'
    energy. The residual must contribute 1 - (1 - epsilon) / outside of its own; nothing where outside <= 1 - epsilon.
    """
    if outside <= 1 - epsilon:
        return directions_DM[:, :0]
    return directions_DM[:, : leading(energies, 1 - (1 - epsilon) / outside)]


class FOT(Projection):
    """Project every change onto the complement of each layer's basis; extend the bases at the end of a task.

    Parameters
    ----------
    epsilon
        Share of the energy of a layer's inputs that its basis must keep, in (0, 1].
    epsilon_increment
        Added to epsilon after each task; epsilon stays at most 1.
    variant
        ``official``: what the published code does. ``corrected``: what its energy argument asks for.
    method
        What clients send: ``gram`` (D, D), exact, or ``sketch`` (D, sketch_width), random. ``auto`` is the Gram matrix,
        and the sketch for ``official``, which knows no other.
    sketch_width
        Columns of a sketch; None for as many as the layer has inputs.
    layers
        Names of the weights to protect; None for every weight matrix and 2-d kernel that no task head owns.
    asks
        Which clients answer in the corrected variant: ``all``, or those of the task's last round (``updated``), to
        whom ``official`` always turns.

    Raises
    ------
    ValueError
        From :meth:`setup`: a layer does not exist or cannot be protected, or variant and method exclude each other.
    """

    keeps_updates: ClassVar[bool] = True

    def __init__(
        self,
        *,
        epsilon: float = 0.9,
        epsilon_increment: float = 0.0,
        variant: Variant = "corrected",
        method: Method = "auto",
        sketch_width: int | None = None,
        layers: Sequence[str] | None = None,
        asks: Literal["all", "updated"] = "all",
    ) -> None:
        self.epsilon, self.epsilon_increment = epsilon, epsilon_increment
        self.variant, self.method, self.sketch_width = variant, method, sketch_width
        self.layers, self.asks = layers, asks
        self._weights: dict[str, TensorSpec] = {}
        self._bases: dict[str, Tensor] = {}
        self._ignored = 0

    @property
    def sketches(self) -> bool:
        """Whether clients send sketches, not Gram matrices."""
        return self.method == "sketch" or self.variant == "official"

    def basis(self, layer: str) -> Tensor:
        """Return the orthonormal basis (D, K) of ``layer``, float64 on the CPU; K = 0 before the first task's end."""
        empty = torch.zeros(_inputs(self._weights[layer]), 0, dtype=torch.float64)
        return self._bases.get(layer, empty)

    def setup(self, spec: Spec) -> None:
        """Find the weights to protect."""
        if self.variant == "official" and self.method == "gram":
            raise ValueError("strategy.projection.server.method=gram: variant=official sends sketches; use auto")
        self._weights = {tensor.name.removesuffix(".weight"): tensor for tensor in _protected(spec, self.layers)}

    def resize(self, old_spec: Spec, new_spec: Spec) -> None:
        """Find the weights again; a basis belongs to a layer's inputs, so it may gain outputs only."""
        self.setup(new_spec)
        for layer, basis_DK in self._bases.items():
            if layer not in self._weights or _inputs(self._weights[layer]) != basis_DK.shape[0]:
                raise ValueError(f"strategy.projection: the inputs of {layer} have changed; FOT has a basis for them")

    def apply(self, target: Target, change: Tensor, view: ServerView) -> Tensor:
        """Return the change (P,) without what each layer's basis spans: dW - (dW U) U^T (FedProject, eq. 5)."""
        allowed = change.clone()
        for layer, basis_DK in self._bases.items():
            weight = self._weights[layer]
            rows = allowed[weight.start : weight.stop].view(-1, basis_DK.shape[0])
            rows.copy_(project_out(rows, basis_DK))
        return allowed

    def queries(self, event: Event, view: ServerView) -> list[Query]:
        """Ask for the layer inputs' subspace at the end of every task that another one follows."""
        if event.kind != "task_end" or event.is_last_task:
            return []
        if self.variant == "official":
            models = {update.client: update.model for update in event.updates}
        else:
            asked = view.clients if self.asks == "all" else tuple(update.client for update in event.updates)
            models = {client: view.model_of(client) for client in asked}
        # With Gram matrices the server projects; the empty bases only say which layers are meant.
        bases = {layer: self.basis(layer).float() for layer in self._weights}
        request = {f"{layer}/basis": u if self.sketches else u[:, :0].contiguous() for layer, u in bases.items()}
        return [Query(SUBSPACE, models, request)] if models else []

    def absorb(self, query: Query, answers: Sequence[Answer], view: ServerView) -> None:
        """Extend each layer's basis by the principal directions of what it does not hold yet (GPSE)."""
        sound = [answer for answer in answers if self._fits(answer)]
        self._ignored += len(answers) - len(sound)
        if not sound:
            return
        estimate: Callable[[str, Sequence[Answer]], Tensor]
        if self.variant == "official":
            estimate = self._official
        else:
            estimate = self._from_sketches if self.sketches else self._from_grams
        for layer in self._weights:
            extended = extend_basis(self.basis(layer), estimate(layer, sound))
            if extended.shape[1]:
                self._bases[layer] = extended
        self.epsilon = min(1.0, self.epsilon + self.epsilon_increment)

    def _official(self, layer: str, answers: Sequence[Answer]) -> Tensor:
        total = sum(answer.num_examples for answer in answers)
        ratio = sum(
            answer.num_examples / total * _ratio(_scalar(answer, layer, "residual"), _scalar(answer, layer, "energy"))
            for answer in answers
        )
        return directions_official(_summed(answers, f"{layer}/sketch"), ratio, self.epsilon)

    def _from_sketches(self, layer: str, answers: Sequence[Answer]) -> Tensor:
        energies, directions = sketch_spectrum(_summed(answers, f"{layer}/sketch"))
        residual = sum(_scalar(answer, layer, "residual") for answer in answers)
        energy = sum(_scalar(answer, layer, "energy") for answer in answers)
        return directions_corrected(energies, directions, residual / energy if energy else 0.0, self.epsilon)

    def _from_grams(self, layer: str, answers: Sequence[Answer]) -> Tensor:
        gram_DD = _summed(answers, f"{layer}/gram")
        residual_DD = project_out_gram(gram_DD, self.basis(layer))
        energy = float(gram_DD.trace())
        energies, directions = gram_spectrum(residual_DD)
        outside = float(residual_DD.trace()) / energy if energy > 0 else 0.0
        return directions_corrected(energies, directions, outside, self.epsilon)

    def _fits(self, answer: Answer) -> bool:
        """Whether an answer has just the tensors, of just the shapes, that were asked for."""
        expected: dict[str, tuple[int, ...]] = {}
        for layer, weight in self._weights.items():
            inputs = _inputs(weight)
            if self.sketches:
                expected[f"{layer}/sketch"] = (inputs, self.sketch_width or inputs)
                expected |= {f"{layer}/energy": (1,), f"{layer}/residual": (1,)}
            else:
                expected[f"{layer}/gram"] = (inputs, inputs)
        return {name: tuple(tensor.shape) for name, tensor in answer.tensors.items()} == expected

    def metrics(self) -> dict[str, float]:
        """Return ``rank/<layer>``, ``frozen_share/<layer>`` (rank over inputs: above 0.9 a layer hardly learns)."""
        numbers = {"epsilon": self.epsilon, "answers_ignored": float(self._ignored)}
        for layer, weight in self._weights.items():
            rank = self.basis(layer).shape[1]
            numbers |= {f"rank/{layer}": float(rank), f"frozen_share/{layer}": rank / _inputs(weight)}
        return numbers

    def state_dict(self) -> dict[str, Any]:
        """Return bases by layer, epsilon, and the count of ignored answers."""
        return {"bases": dict(self._bases), "epsilon": self.epsilon, "answers_ignored": self._ignored}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore them."""
        self._bases = dict(state["bases"])
        self.epsilon, self._ignored = float(state["epsilon"]), int(state["answers_ignored"])

    def forget(self, request: ForgetRequest) -> Residual:
        """Say that directions found in sums over clients stay: nobody's share can be taken out of a basis."""
        if not self._bases:
            return super().forget(request)
        why = "the bases span principal layer inputs summed over clients and tasks; no part of them is the forget set's"
        return Residual(type(self).__name__, "remains", why)


def _protected(spec: Spec, layers: Sequence[str] | None) -> list[TensorSpec]:
    key = "strategy.projection.server.layers"
    if layers is None:
        found = [t for t in spec if t.kind == "parameter" and t.task is None and len(t.shape) >= 2]
    else:
        missing = [name for name in layers if name not in spec]
        if missing:
            raise ValueError(f"{key}={list(layers)}: {missing[0]} is no tensor of the model")
        found = [spec[name] for name in layers]
    if not found:
        raise ValueError(f"{key}={layers}: leaves no weight to protect")
    for tensor in found:
        if len(tensor.shape) not in (2, 4) or not tensor.name.endswith(".weight"):
            raise ValueError(
                f"{key}: {tensor.name} of shape {tensor.shape} is no weight of a linear or 2-d convolution layer; "
                f"name the layers to protect"
            )
    return found


def _inputs(weight: TensorSpec) -> int:
    """Return D: what one output of the layer reads, a whole patch for a convolution."""
    return weight.size // weight.shape[0]


def _summed(answers: Sequence[Answer], name: str) -> Tensor:
    total = torch.zeros(answers[0].tensors[name].shape, dtype=torch.float64)
    for answer in answers:
        total += answer.tensors[name].double()
    return total


def _scalar(answer: Answer, layer: str, name: str) -> float:
    return float(answer.tensors[f"{layer}/{name}"][0])


def _ratio(residual: float, energy: float) -> float:
    """Return the ratio of norms, from squared norms."""
    return (residual / energy) ** 0.5 if energy > 0 else 0.0
