"""What an owner may ask to have forgotten, and what each part answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class ForgetRequest:
    """An unlearning request: its ``scope``, and the clients, classes, samples or tasks it names."""

    id: str
    scope: Literal["client", "class", "sample", "task"]
    clients: tuple[str, ...] = ()
    classes: tuple[int, ...] = ()
    samples: tuple[int, ...] = ()
    tasks: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Residual:
    """What became of a part's memory of the forget set, and why: printed on the certificate when it ``remains``."""

    part: str
    outcome: Literal["erased", "recomputed", "reset", "remains", "none"]
    why: str
