"""Which samples a replay buffer keeps: pure functions over labels, features and draws."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

# M = samples in memory, N = samples to choose from, F = features, K = chosen
Policy = Literal["reservoir", "class_balanced", "herding"]
_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
_BYTES = re.compile(rf"(\d+(?:\.\d+)?)\s*({'|'.join(_UNITS)})")


@dataclass(frozen=True, slots=True)
class Budget:
    """How much a buffer may hold: samples, or bytes of samples in the form they are stored in."""

    amount: int
    in_bytes: bool = False

    @classmethod
    def of(cls, value: int | str, key: str = "budget") -> Budget:
        """Read ``200`` (samples) or ``"64KB"``, ``"1.5MiB"`` (bytes; KB is 1000 of them, KiB 1024).

        Raises
        ------
        ValueError
            For anything else, naming ``key``.
        """
        if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
            return cls(value)
        match = _BYTES.fullmatch(value) if isinstance(value, str) else None
        if match is None:
            raise ValueError(f"{key}={value}: must be >= 0 samples, as in 200, or bytes, as in 64KB or 1.5MiB")
        return cls(int(float(match[1]) * _UNITS[match[2]]), in_bytes=True)

    def samples(self, sample_bytes: int) -> int:
        """Return how many samples of ``sample_bytes`` bytes each there is room for.

        Raises
        ------
        ValueError
            If not even one fits into a budget in bytes that is not 0.
        """
        if not self.in_bytes:
            return self.amount
        if 0 < self.amount < sample_bytes:
            raise ValueError(f"budget={self.amount}B: must be 0, or >= {sample_bytes}B, which one sample takes here")
        return self.amount // sample_bytes


def check_policy(policy: str) -> None:
    """Reject an unknown policy with a ValueError."""
    if policy not in get_args(Policy):
        raise ValueError(f"policy={policy}: must be one of {', '.join(get_args(Policy))}")


def uniform_slots(seen: int, arriving: int, generator: torch.Generator) -> list[int]:
    """Return the slot that each of ``arriving`` samples draws after ``seen`` others.

    Algorithm R (Vitter 1985): the k-th sample of a stream, from 0, draws from 0..k; it stays if memory has that slot.
    """
    draws = torch.rand(arriving, generator=generator, dtype=torch.float64).tolist()
    return [int(draw * k) for k, draw in enumerate(draws, start=seen + 1)]


@dataclass(slots=True)
class ClassTally:
    """What class-balanced sampling keeps of the stream: samples seen of each class, and the classes once largest.

    Chrysakis and Moens, "Online Continual Learning from Imbalanced Data", ICML 2020, Algorithm 1.
    """

    seen: dict[int, int] = field(default_factory=dict)
    full: set[int] = field(default_factory=set)

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> ClassTally:
        """Restore what :meth:`state` returned."""
        seen = {int(label): count for label, count in state.get("class_seen", {}).items()}
        return cls(seen, set(state.get("class_full", [])))

    def state(self) -> dict[str, Any]:
        """Return the counts and the full classes; nothing before the first sample."""
        seen = {str(label): count for label, count in self.seen.items()}
        return {"class_seen": seen, "class_full": sorted(self.full)} if seen else {}

    def count(self, labels: Sequence[int]) -> None:
        """Count samples that were added to free slots."""
        for label in labels:
            self.seen[label] = self.seen.get(label, 0) + 1

    def forget(self, labels: Iterable[int]) -> None:
        """Erase these classes from the counts."""
        for label in labels:
            self.seen.pop(label, None)
            self.full.discard(label)

    def slots(self, held: Sequence[int], arriving: Sequence[int], generator: torch.Generator) -> list[int]:
        """Return the slot that each arriving sample takes in full memory (labels ``held``); -1 for none.

        A sample of a class that has never been largest replaces a random sample of a largest class; each other class is
        a reservoir of its own. So every class tends to an equal share, and within it to a uniform sample.
        """
        places: dict[int, list[int]] = {}
        for slot, label in enumerate(held):
            places.setdefault(label, []).append(slot)

        def draw(count: int) -> int:
            return int(torch.randint(count, (1,), generator=generator))

        taken = []
        for label in arriving:
            self.count([label])
            most = max(map(len, places.values()))
            largest = sorted(c for c, slots in places.items() if len(slots) == most)
            self.full.update(largest)
            mine = places.setdefault(label, [])
            if label not in self.full:
                theirs = places[largest[draw(len(largest))]]
                mine.append(theirs.pop(draw(len(theirs))))
                taken.append(mine[-1])
                continue
            place = draw(self.seen[label])
            taken.append(mine[place] if place < len(mine) else -1)
        return taken


@torch.no_grad()
def herd(features_NF: Tensor, count: int) -> Tensor:
    """Return the positions (K,) of the ``count`` samples whose running mean stays nearest to the mean of all, in order.

    Rebuffi et al., "iCaRL: Incremental Classifier and Representation Learning", CVPR 2017, Algorithm 4: features are
    divided by their norm; the k-th choice is that x for which ``|mu - 1/k (phi(x) + sum of the chosen)|`` is smallest.
    (The paper also divides averages by their norm; the mean of all samples would then not be at distance 0 from mu.)
    Any prefix of the order is what a smaller ``count`` would have chosen.
    """
    phi_NF = F.normalize(features_NF, dim=1)
    mean_F = phi_NF.mean(0)
    total_F = torch.zeros_like(mean_F)
    free_N = torch.zeros(len(phi_NF), device=phi_NF.device)
    chosen = []
    for k in range(1, min(count, len(phi_NF)) + 1):
        distance_N = (mean_F - (total_F + phi_NF) / k).square().sum(1) + free_N
        best = distance_N.argmin()
        chosen.append(best)
        free_N[best] = torch.inf
        total_F = total_F + phi_NF[best]
    return torch.stack(chosen) if chosen else torch.zeros(0, dtype=torch.int64, device=phi_NF.device)


def shares(sizes: Sequence[int], capacity: int) -> list[int]:
    """Divide ``capacity`` equally among groups of these sizes; what small groups do not use goes to the others."""
    given = [0] * len(sizes)
    left = min(capacity, sum(sizes))
    while left:
        open_groups = [i for i, size in enumerate(sizes) if given[i] < size]
        each, rest = divmod(left, len(open_groups))
        for position, i in enumerate(open_groups):
            more = min(each + (position < rest), sizes[i] - given[i])
            given[i] += more
            left -= more
    return given


def exemplars(held: tuple[Tensor, Tensor], labels_N: Tensor, features_NF: Tensor, capacity: int) -> Tensor:
    """Return which samples herding keeps: positions in the held samples followed by the new ones.

    ``held`` are task and label of the held samples, (M,) each, within a class of a task in the order of choice. The new
    samples are of one further task. Every class of every task gets an equal share.
    """
    task_M, label_M = held
    groups = [
        torch.nonzero((task_M == task) & (label_M == label)).squeeze(1)
        for task, label in sorted(set(zip(task_M.tolist(), label_M.tolist(), strict=True)))
    ]
    for label in sorted(set(labels_N.tolist())):
        members = torch.nonzero(labels_N == label).squeeze(1)
        groups.append(len(task_M) + members[herd(features_NF[members], min(len(members), capacity))])
    sizes = shares([len(group) for group in groups], capacity)
    return torch.cat([group[:size] for group, size in zip(groups, sizes, strict=True)])
