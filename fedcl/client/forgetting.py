"""A client's samples of all its tasks, split into what is to be forgotten and what may stay."""

from __future__ import annotations

import numpy as np
import torch

from fedcl.client.local_data import PartitionedData
from fedcl.contracts.learner import TaskData
from fedcl.contracts.requests import ForgetInstruction, Forgotten
from fedcl.contracts.unlearner import Samples
from fedcl.models.masks import column_mask
from fedcl.scenario.task import Task

# N = samples, C = logit columns


def part(
    data: PartitionedData, client: str, instruction: ForgetInstruction, device: torch.device
) -> list[tuple[Task, TaskData, TaskData]]:
    """Return (task, to forget, to retain) for every task of ``instruction`` of which ``client`` holds something.

    Raises
    ------
    ValueError
        If the data source cannot tell its samples apart.
    """
    after = Forgotten(list(instruction.requests))
    parts = []
    for task in instruction.tasks:
        held = data.train(client, task, device)
        if not len(held):
            continue
        nothing = torch.zeros(len(held), dtype=torch.bool)
        if instruction.leaves(client):
            parts.append((task, held, _rows(held, nothing)))
            continue
        kept = data.train(client, after.task(client, task), device)
        if kept is held:  # no request concerns this task
            parts.append((task, _rows(held, nothing), held))
            continue
        if held.positions is None or kept.positions is None:
            raise ValueError(f"the data of client {client} have no positions: single samples cannot be told apart")
        stays = torch.from_numpy(np.isin(held.positions, kept.positions))
        parts.append((task, _rows(held, ~stays), kept))
    return parts


def samples(parts: list[tuple[Task, TaskData]], num_columns: int, device: torch.device) -> Samples:
    """Return the samples of several tasks in one, each with the columns that its task may predict."""
    joined = []
    for task, data in parts:
        if len(data):
            mask = column_mask(task.mask, num_columns, data.y.device)
            masks = None if mask is None else mask.expand(len(data), num_columns)
            joined.append(Samples(data.x, data.y, masks, torch.full_like(data.y, task.id)))
    if not joined:
        return Samples(torch.empty(0, device=device), torch.empty(0, dtype=torch.long, device=device))
    return Samples.join(joined)


def joined(parts: list[TaskData]) -> TaskData:
    """Return the samples of several tasks in one; ``raw`` only where all have it."""
    filled = [data for data in parts if len(data)]
    if not filled:
        return TaskData(torch.empty(0), torch.empty(0, dtype=torch.long))
    raw = [data.raw for data in filled if data.raw is not None]
    positions = [data.positions for data in filled if data.positions is not None]
    return TaskData(
        torch.cat([data.x for data in filled]),
        torch.cat([data.y for data in filled]),
        torch.cat(raw) if len(raw) == len(filled) else None,
        filled[0].restore,
        np.concatenate(positions) if len(positions) == len(filled) else None,
    )


def _rows(data: TaskData, chosen: torch.Tensor) -> TaskData:
    there = chosen.to(data.y.device)
    raw = None if data.raw is None else data.raw[there]
    positions = None if data.positions is None else data.positions[chosen.numpy()]
    return TaskData(data.x[there], data.y[there], raw, data.restore, positions)
