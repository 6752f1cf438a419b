"""Is a reply as declared? Pure, so that it can run wherever the reply is."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, cast, get_args

import torch
from torch import Tensor

from fedcl.contracts.fields import (
    ITERATION,
    LARGEST,
    MAX_EXAMPLES,
    MAX_METRICS,
    MAX_NOTE,
    MODEL,
    NOTHING,
    REPLIES,
    DType,
    Form,
    ReplyFields,
    TensorField,
    clean,
    shown,
)
from fedcl.contracts.learner import Payload
from fedcl.contracts.requests import outcomes_from
from fedcl.messages import Kind, Reply
from fedcl.models.flat import Spec

_DTYPES = {name: getattr(torch, name) for name in get_args(DType)}
OUTLIER = 10.0  # times the median norm, from which an update or a payload is worth a note


def uploads(payloads: Iterable[Payload]) -> Form:
    """Return the tensors of ``payloads`` that the reply to every train message carries, by name."""
    return {p.name: p.tensor for p in payloads if p.direction == "up" and p.tensor is not None}


@dataclass(frozen=True)
class Expected:
    """What a reply to one kind of message must be, with every length a number; :meth:`of` works it out.

    ``tensors`` are those of its payload, ``always`` the names that must be there, each of ``groups`` names of which all
    or none must be there. ``required`` are the metrics that a client with samples must send. ``num_tasks`` is the
    number of the run's tasks if clients evaluate themselves during training, otherwise 0.
    """

    kind: Kind
    spec: Spec
    fields: ReplyFields
    model: TensorField
    tensors: Form
    always: frozenset[str]
    groups: tuple[frozenset[str], ...]
    required: frozenset[str]
    num_tasks: int = 0

    @classmethod
    def of(cls, kind: Kind, spec: Spec, form: Form = NOTHING, num_tasks: int = 0) -> Expected:
        """Return what is expected of a reply whose payload has ``form``."""
        sizes, fields = spec.sizes(), REPLIES[kind]
        groups: dict[str, set[str]] = {"": set()}
        for name, tensor in form.items():
            groups.setdefault(tensor.group, set()).add(name)
        always, *others = (frozenset(names) for names in groups.values())
        required = frozenset(name for name, number in fields.metrics.items() if number.required)
        tensors = {name: tensor.resolved(sizes) for name, tensor in form.items()}
        return cls(kind, spec, fields, MODEL.resolved(sizes), tensors, always, tuple(others), required, num_tasks)


class Diverged(NamedTuple):
    """The number that shows that training has diverged: a loss or a weight that is not finite, or too large."""

    of: Literal["loss", "weights"]
    value: float


@dataclass(frozen=True, slots=True)
class Rejection:
    """Why a reply cannot be used, in words that name the field at fault."""

    reason: str
    diverged: Diverged | None = None


def rejection(
    reply: Reply, expected: Expected, *, base: Tensor | None = None, max_norm: float | None = None
) -> Rejection | None:
    """Return why ``reply`` cannot be used, or None if it is sound.

    Whatever a client wrote into the reply's fields is data: nothing here raises.

    Parameters
    ----------
    base, max_norm
        The weights that were sent, float32 (P,), and the largest L2 norm that a change of them may have; None for any.
    """
    count = cast(Any, reply.num_examples)
    if type(count) is not int or not 0 <= count <= MAX_EXAMPLES:
        return Rejection(f"num_examples={shown(count)}: must be a whole number (int) in [0, {MAX_EXAMPLES}]")
    found: Rejection | str | None = _metrics(reply, expected)
    if found is None and (expected.fields.model or reply.model is not None):
        found = _model(reply.model, expected)
    if found is None and (reply.payload or (expected.tensors and count)):
        found = _payload(reply, expected)
    if found is None and (reply.note or expected.fields.note):
        found = _note(reply.note, expected.fields.note)
    if found is None and max_norm is not None and reply.model is not None and base is not None:
        norm = change_norm(reply.model, base)
        if norm > max_norm:
            found = f"the change has norm {norm:.6g}, beyond max_update_norm={max_norm:g}"
    return Rejection(found) if isinstance(found, str) else found


def _metrics(reply: Reply, expected: Expected) -> Rejection | str | None:
    metrics, known = reply.metrics, expected.fields.metrics
    if len(metrics) > MAX_METRICS:
        return f"{len(metrics)} metrics: at most {MAX_METRICS} are allowed"
    required = 0
    for name, value in metrics.items():
        number = known.get(name) or _iteration(name, expected)
        if number is None:
            return f"metric {shown(name)} is not allowed in a reply to {expected.kind!r}"
        required += number.required
        if type(value) is float and number.low <= value <= number.high and not number.whole:
            continue  # as most are
        refused = number.refusal(value)
        if refused is not None:
            diverged = Diverged("loss", value) if name == "loss" and isinstance(value, float) else None
            return Rejection(f"metric {name} is {shown(value)}: {refused}", diverged)
    if reply.num_examples and required < len(expected.required):
        return f"metric {min(expected.required - metrics.keys())} is missing"
    return None


def _iteration(name: Any, expected: Expected) -> Any:
    """Return what a metric of an evaluation within training must be, if ``name`` is one and the run has them."""
    match = ITERATION.fullmatch(name) if expected.num_tasks and isinstance(name, str) else None
    if match is None or not expected.fields.iterations or int(match[1]) >= expected.num_tasks:
        return None
    return expected.fields.metrics["accuracy_received"]


def _model(vector: Any, expected: Expected) -> Rejection | str | None:
    if not expected.fields.model:
        return f"a model in a reply to {expected.kind!r}, which asks for none"
    if vector is None:
        return "no model in the reply"
    reason = _tensor("model", vector, expected.model)
    if reason is None:
        return None
    if not isinstance(vector, Tensor) or vector.dtype != torch.float32 or vector.shape != expected.model.shape:
        return reason
    bad = int(torch.nonzero(~(vector.abs() <= LARGEST))[0])
    tensor, value = expected.spec.tensor_at(bad), float(vector[bad])
    where = f"tensor {tensor.name} holds {value:.6g} at position {bad - tensor.start}"
    return Rejection(f"{where}: must be a number in [{-LARGEST:g}, {LARGEST:g}]", Diverged("weights", value))


def _payload(reply: Reply, expected: Expected) -> str | None:
    came, tensors = reply.payload.keys(), expected.tensors
    unknown = next((name for name in came if name not in tensors), None)
    if unknown is not None:
        return f"payload holds {shown(unknown)}, which was not asked for"
    for names in (expected.always, *(group for group in expected.groups if came & group)):
        if not names <= came:
            return f"payload {min(names - came)} is missing"
    for name, tensor in reply.payload.items():
        reason = _tensor(f"payload {name}", tensor, tensors[name])
        if reason is None and tensors[name].counts and float(tensor.double().sum()) != reply.num_examples:
            reason = f"payload {name} adds up to {float(tensor.double().sum()):g}: must be num_examples"
        if reason is not None:
            return reason
    return None


def _tensor(name: str, tensor: Any, declared: TensorField) -> str | None:
    """Return what is wrong with a tensor: type and shape first, so that reading its values cannot take long."""
    if not isinstance(tensor, Tensor) or tensor.layout != torch.strided or tensor.is_meta:
        return f"{name} is {shown(type(tensor).__name__)}: must be a dense tensor"
    if tensor.dtype is not _DTYPES[declared.dtype]:
        return f"{name} is {tensor.dtype}: must be torch.{declared.dtype}"
    if tensor.shape != declared.shape:  # torch.Size is a tuple
        return f"{name} has shape {shown(tuple(tensor.shape))}: must be {declared.shape}"
    if not tensor.numel():
        return None
    # one pass over memory; nan is both the least and the largest
    least_of, largest_of = torch.aminmax(tensor.detach() if tensor.requires_grad else tensor)
    least, largest, low, high = float(least_of), float(largest_of), declared.low, declared.high
    if low <= least and largest <= high:
        return None
    worst = least if not low <= least else largest
    return f"{name} holds {worst:.6g}: must be numbers in [{low:g}, {high:g}]"


def _note(note: Any, wanted: bool) -> str | None:
    if not wanted:
        return "unexpected note: none was asked for"
    if not isinstance(note, str) or len(note) > MAX_NOTE:
        return f"note is {shown(note)}: must be a text of at most {MAX_NOTE} characters"
    try:
        outcomes_from(note)
    except ValueError as error:
        return clean(str(error))
    return None


def change_norm(model: Tensor, base: Tensor) -> float:
    """Return the L2 norm of ``model - base``, both float32 (P,)."""
    base = base.to(model.device)
    norm = float(torch.dist(model, base))
    # a square may overflow where the norm does not
    return norm if math.isfinite(norm) else float(torch.linalg.vector_norm(model.double() - base.double()))


def payload_norms(payload: Mapping[str, Tensor]) -> dict[str, float]:
    """Return the L2 norms, by name, of the tensors that hold quantities and not choices or bits."""
    return {
        name: float(torch.linalg.vector_norm(tensor, dtype=torch.float64))
        for name, tensor in payload.items()
        if tensor.is_floating_point()
    }


def outliers(norms: Mapping[str, float]) -> tuple[float, list[str]]:
    """Return the median of ``norms`` by client, and the clients far beyond it; none of fewer than three clients."""
    if len(norms) < 3:
        return 0.0, []
    median = statistics.median(norms.values())
    return median, [client for client, norm in norms.items() if norm > OUTLIER * median]


def payload_outliers(
    norms: Mapping[str, Mapping[str, float]], sizes: Mapping[str, int] | None = None
) -> Iterator[dict[str, Any]]:
    """Yield, as an event's fields, whose tensor is far larger than the others' of its name.

    ``norms`` are by client and name, ``sizes`` the numbers of samples that a client's tensors are sums over: with them,
    the norm for each sample must be far larger too.
    """
    for name in {name: None for own in norms.values() for name in own}:
        whole = {client: own[name] for client, own in norms.items() if name in own}
        median, far = outliers(whole)
        if sizes is not None:
            each = outliers({client: norm / sizes[client] for client, norm in whole.items()})[1]
            far = [client for client in far if client in each]
        for client in far if median else ():
            yield {"client": client, "payload": name, "norm": whole[client], "median": median}
