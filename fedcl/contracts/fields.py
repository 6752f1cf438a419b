"""What a client may send, field by field: names, types, shapes and bounds, declared once and judged before use.

Whatever comes from a client is data. :mod:`fedcl.messages` reads its form, :mod:`fedcl.server.validation` its values;
both go by the declarations here and by those that methods make of their own tensors (:class:`TensorField`).
"""

from __future__ import annotations

import re
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

CLIENT_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
CODE = re.compile(r"[A-Za-z0-9.+!_-]{1,64}")  # a version of fedcl
MAX_EXAMPLES = 1_000_000_000
MAX_FLOAT32 = 3.4028234663852886e38
MAX_TEXT = 500  # characters of a text that a person may read
_CUT = "..."
_shown = reprlib.Repr()
_shown.maxstring = _shown.maxother = 80


def clean(text: str, limit: int = MAX_TEXT) -> str:
    """Return ``text`` as one line of at most ``limit`` characters that any file and terminal takes.

    White space becomes single spaces; lone surrogates, control characters and marks that change the direction of text
    become their escapes.
    """
    cut = text[: limit + 1]
    if not cut.isprintable():
        cut = " ".join(cut.split())
        cut = "".join(c if c.isprintable() else _escape(c) for c in cut)
    return cut if len(cut) <= limit else cut[: limit - len(_CUT)] + _CUT


def _escape(character: str) -> str:
    return character.encode("unicode_escape", "surrogatepass").decode("ascii")


def shown(value: object) -> str:
    """Return a foreign value as a message may show it, however large and odd it is."""
    return clean(_shown.repr(value), 120)


def whole(value: object, name: str, highest: int = MAX_EXAMPLES) -> int:
    """Return ``value`` if it is an int in [0, ``highest``].

    Raises
    ------
    ValueError
        Naming the field: a bool or a float is no int, whatever its value.
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
    """What one tensor from a client must be. The core judges it before any part sees it.

    Parameters
    ----------
    shape
        Exact lengths. ``model`` is that of a model vector, ``parameters`` that of its head without the buffers,
        ``columns`` the number of logit columns, ``features`` what a head reads, ``bitmask`` the bytes of a bit for each
        of a model vector's numbers; anything else a method works out by itself.
    dtype
        Exact.
    low, high
        Bounds of every number in it, at most ``LARGEST`` from zero; none that is not finite is within any.
    counts
        Whether its sum is the client's ``num_examples``.
    group
        Tensors of one group come together or not at all; those without a group always come.

    Raises
    ------
    ValueError
        If the bounds are none.
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
        """Return the field with every length a number, as ``sizes`` gives them by name."""
        lengths = tuple(sizes[length] if isinstance(length, str) else length for length in self.shape)
        return replace(self, shape=lengths)


Form = Mapping[str, TensorField]  # the tensors of an answer, by name
NOTHING: Form = {}
MODEL = TensorField(("model",))  # a vector as long as the model's


# -- numbers -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class NumberField:
    """A metric: its bounds, whether it is a whole number, and whether a client with samples owes it."""

    low: float = -MAX_FLOAT32
    high: float = MAX_FLOAT32
    whole: bool = False
    owed: bool = False

    def refusal(self, value: object) -> str | None:
        """Return what is wrong with ``value``, if anything."""
        # exact types: a bool is an int, and numpy's are none that JSON takes
        if type(value) not in (float, int) or not self.low <= value <= self.high:  # type: ignore[operator]
            return f"must be a number in [{self.low:g}, {self.high:g}]"
        return "must be a whole number" if self.whole and value % 1 else None  # type: ignore[operator]


_SHARE = NumberField(0.0, 1.0)
_COUNT = NumberField(0.0, 1e15, whole=True)
ITERATION = re.compile(r"accuracy@(0|[1-9]\d{0,8})@(0|[1-9]\d{0,8})")  # task, step


@dataclass(frozen=True, slots=True)
class ReplyFields:
    """What a reply to one kind of message may hold besides ``num-examples``.

    ``metrics`` is the closed list of their names, ``iterations`` says that ``accuracy@<task>@<step>`` may come besides.
    """

    metrics: Mapping[str, NumberField] = field(default_factory=dict)
    iterations: bool = False
    model: bool = False
    payload: bool = False
    note: bool = False


TRAINED = {
    "loss": NumberField(owed=True),
    "loss_first": NumberField(owed=True),
    "steps": replace(_COUNT, owed=True),
    "samples_trained": replace(_COUNT, owed=True),
    "accuracy_received": _SHARE,
    "accuracy_trained": _SHARE,
    "state_bytes": _COUNT,
}
REPLIES: Mapping[str, ReplyFields] = {
    "train": ReplyFields(TRAINED, iterations=True, model=True, payload=True),
    "evaluate": ReplyFields({"accuracy": replace(_SHARE, owed=True)}),
    "query": ReplyFields(payload=True),
    "unlearn": ReplyFields(payload=True),
    "task_end": ReplyFields(),
    "forget": ReplyFields(note=True),
}
MAX_METRICS = 1 << 16  # of one reply
MAX_NOTE = 1 << 16  # characters
MAX_OUTCOMES = 256  # of one note
