"""What a client may send, field by field: names, types, shapes and bounds, declared once and checked before use.

Everything from a client is data. :mod:`fedcl.messages` checks its form, :mod:`fedcl.server.validation` its values. Both
use the declarations here and those that methods make of their own tensors (:class:`TensorField`).
"""

from __future__ import annotations

import re
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

CLIENT_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
CODE = re.compile(r"[A-Za-z0-9.+!_-]{1,64}")  # a version of fedcl
BASE = re.compile(r"([0-9a-f]{64})?")  # the digest of a model's fixed tensors; empty without any
MAX_EXAMPLES = 1_000_000_000
MAX_FLOAT32 = 3.4028234663852886e38
MAX_TEXT = 500  # characters of a text that a person may read
_CUT = "..."
_shown = reprlib.Repr()
_shown.maxstring = _shown.maxother = 80


def clean(text: str, limit: int = MAX_TEXT) -> str:
    """Return ``text`` as one line of at most ``limit`` characters that is safe for any file and terminal.

    White space becomes single spaces; lone surrogates, control characters and marks that change the text direction are
    escaped.
    """
    cut = text[: limit + 1]
    if not cut.isprintable():
        cut = " ".join(cut.split())
        cut = "".join(c if c.isprintable() else _escape(c) for c in cut)
    return cut if len(cut) <= limit else cut[: limit - len(_CUT)] + _CUT


def _escape(character: str) -> str:
    return character.encode("unicode_escape", "surrogatepass").decode("ascii")


def shown(value: object) -> str:
    """Return a client's value, however large and odd, in a form that is safe in a message."""
    return clean(_shown.repr(value), 120)


def whole(value: object, name: str, highest: int = MAX_EXAMPLES) -> int:
    """Return ``value`` if it is an int in [0, ``highest``].

    Raises
    ------
    ValueError
        Naming the field, if it is anything else; a bool or a float is not an int, whatever its value.
    """
    if type(value) is not int or not 0 <= value <= highest:
        raise ValueError(f"{name} is {shown(value)}: must be a whole number (int) in [0, {highest}]")
    return value


# -- tensors that methods exchange -------------------------------------------------------------------------------------

# The square of a number up to this, and sums over any number of clients, stay finite in float32, as models are.
LARGEST = 1e18
Dimension = int | Literal["model", "parameters", "columns", "features", "bitmask"]
DType = Literal["float32", "float64", "int64", "uint8"]


@dataclass(frozen=True, slots=True)
class TensorField:
    """The form of one tensor from a client. The core checks it before any part sees it.

    Parameters
    ----------
    shape
        Exact lengths. ``model`` is the length of a model vector, ``parameters`` its length without the buffers,
        ``columns`` the number of logit columns, ``features`` the number of features a head reads, ``bitmask`` the bytes
        of one bit for each element of a model vector. Other lengths are numbers.
    dtype
        Exact.
    low, high
        Bounds of every number in it, at most ``LARGEST`` from zero. Numbers that are not finite are never within them.
    counts
        Whether its sum is the client's ``num_examples``.
    group
        Tensors of one group must be sent together or not at all; those without a group are always required.

    Raises
    ------
    ValueError
        If the bounds are not in order or too large.
    """

    shape: tuple[Dimension, ...]
    dtype: DType = "float32"
    low: float = field(default=-LARGEST, compare=False)
    high: float = field(default=LARGEST, compare=False)
    counts: bool = field(default=False, compare=False)
    group: str = ""

    def __post_init__(self) -> None:
        if not -LARGEST <= self.low <= self.high <= LARGEST:
            raise ValueError(f"bounds {self.low:g} to {self.high:g}: must be in order, and within {LARGEST:g} of zero")

    def resolved(self, sizes: Mapping[str, int]) -> TensorField:
        """Return the field with the named lengths replaced by those of ``sizes``."""
        lengths = tuple(sizes[length] if isinstance(length, str) else length for length in self.shape)
        return replace(self, shape=lengths)


Form = Mapping[str, TensorField]  # the tensors of a response, by name
NOTHING: Form = {}
MODEL = TensorField(("model",))  # a vector as long as the model's


# -- numbers -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class NumberField:
    """A metric: its bounds, whether it is a whole number, and whether a client with samples must send it."""

    low: float = -MAX_FLOAT32
    high: float = MAX_FLOAT32
    whole: bool = False
    required: bool = False

    def refusal(self, value: object) -> str | None:
        """Return what is wrong with ``value``, or None."""
        # exact types: a bool is an int, and numpy's numbers are not JSON's
        if type(value) not in (float, int) or not self.low <= value <= self.high:  # type: ignore[operator]
            return f"must be a number in [{self.low:g}, {self.high:g}]"
        return "must be a whole number" if self.whole and value % 1 else None  # type: ignore[operator]


_SHARE = NumberField(0.0, 1.0)
_COUNT = NumberField(0.0, 1e15, whole=True)
ITERATION = re.compile(r"accuracy@(0|[1-9]\d{0,8})@(0|[1-9]\d{0,8})")  # task, step


@dataclass(frozen=True, slots=True)
class ReplyFields:
    """What a reply to one kind of message may hold besides ``num-examples``.

    ``metrics`` is the closed list of metrics; with ``iterations``, ``accuracy@<task>@<step>`` is allowed as well.
    """

    metrics: Mapping[str, NumberField] = field(default_factory=dict)
    iterations: bool = False
    model: bool = False
    payload: bool = False
    note: bool = False


TRAINED = {
    "loss": NumberField(required=True),
    "loss_first": NumberField(required=True),
    "steps": replace(_COUNT, required=True),
    "samples_trained": replace(_COUNT, required=True),
    "accuracy_received": _SHARE,
    "accuracy_trained": _SHARE,
    "state_bytes": _COUNT,
}
REPLIES: Mapping[str, ReplyFields] = {
    "train": ReplyFields(TRAINED, iterations=True, model=True, payload=True),
    "evaluate": ReplyFields({"accuracy": replace(_SHARE, required=True)}),
    "query": ReplyFields(payload=True),
    "unlearn": ReplyFields(payload=True),
    "task_end": ReplyFields(),
    "forget": ReplyFields(note=True),
}
MAX_METRICS = 1 << 16  # of one reply
MAX_NOTE = 1 << 16  # characters
MAX_OUTCOMES = 256  # of one note
