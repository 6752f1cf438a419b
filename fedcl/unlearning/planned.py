"""Unlearning requests as a configuration plans them: who asks for what, and before which round."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

from fedcl.config.value_rules import ConfigError
from fedcl.contracts.requests import NAMES, ForgetRequest, Scope
from fedcl.scenario.task import Schedule

_KEYS = {"id", "scope", "at", *NAMES.values()}


def planned_requests(rows: Sequence[Any], schedule: Schedule) -> list[tuple[int, ForgetRequest]]:
    """Return each request with the 0-based round before which it comes.

    ``at`` is ``{round: r}``, ``{task: t, round: k}`` (the k-th round of stage t, 0-based; k is 0 where it is left out)
    or ``end``.

    Raises
    ------
    ConfigError
        Naming the request and what is allowed.
    """
    if not isinstance(rows, Sequence) or isinstance(rows, str):
        raise ConfigError(f"unlearning.requests={rows}: must be a list of requests")
    planned = []
    for place, row in enumerate(rows):
        at = f"unlearning.requests[{place}]"
        if not isinstance(row, Mapping) or not {"scope", "at"} <= row.keys() or not row.keys() <= _KEYS:
            raise ConfigError(
                f"{at}={row}: must have scope and at, may have {', '.join(sorted(_KEYS - {'scope', 'at'}))}"
            )
        request = ForgetRequest(
            id=str(row.get("id", f"r{place}")),
            scope=cast(Scope, row["scope"]),
            clients=tuple(str(client) for client in _listed(row, "clients", (int, str), at)),
            classes=tuple(_listed(row, "classes", int, at)),
            samples=tuple(_listed(row, "samples", int, at)),
            tasks=tuple(_listed(row, "tasks", int, at)),
        )
        planned.append((_round(row["at"], schedule, f"{at}.at"), request))
    ids = [request.id for _, request in planned]
    twice = sorted({name for name in ids if ids.count(name) > 1})
    if twice:
        raise ConfigError(f"unlearning.requests: two have the id {twice[0]}")
    return planned


def _listed(row: Mapping[str, Any], key: str, kind: Any, at: str) -> list[Any]:
    values = row.get(key, [])
    if isinstance(values, (int, str)):
        values = [values]
    if not isinstance(values, Sequence) or any(isinstance(v, bool) or not isinstance(v, kind) for v in values):
        what = "client ids" if key == "clients" else "ints"
        raise ConfigError(f"{at}.{key}={values}: must be a list of {what}")
    return list(values)


def _round(at: Any, schedule: Schedule, place: str) -> int:
    last = schedule.num_rounds
    if at == "end":
        return last
    if not isinstance(at, Mapping) or not at or not at.keys() <= {"task", "round"}:
        raise ConfigError(f"{place}={at}: must be {{round: r}}, {{task: t, round: k}} or end")
    if any(isinstance(value, bool) or not isinstance(value, int) or value < 0 for value in at.values()):
        raise ConfigError(f"{place}={dict(at)}: must be ints >= 0")
    if "task" not in at:
        if at["round"] > last:
            raise ConfigError(f"{place}.round={at['round']}: must be <= {last}, the rounds of the run")
        return int(at["round"])
    rounds = [r for r in range(last) if schedule.stage(r).index == at["task"]]
    if not rounds or at.get("round", 0) >= len(rounds):
        raise ConfigError(f"{place}={dict(at)}: there is no such round; stages have {last} rounds in all")
    return rounds[at.get("round", 0)]
