"""Erasing a forget set from a replay buffer, and the outcome for the certificate."""

from __future__ import annotations

import torch

from fedcl.client.buffer import ReplayBuffer
from fedcl.contracts.learner import Plugin, TaskData
from fedcl.contracts.requests import ErasureOutcome, ForgetRequest


def erase(buffer: ReplayBuffer, owner: Plugin, request: ForgetRequest, forgotten: TaskData) -> ErasureOutcome:
    """Erase what ``buffer`` holds of the samples ``forgotten``, or of the tasks of ``request``, for its ``owner``.

    Samples are identified by their content, so equal ones are erased together; of a task only what was seen in it is
    erased. Where samples are held in a form that ``forgotten`` does not have, the outcome is ``reset``. The texts
    contain no number, so that a certificate can join equal outcomes of clients.
    """
    name = type(owner).__name__
    if not len(buffer):
        return ErasureOutcome(name, "not applicable", "holds no samples")
    if request.scope == "task":
        count = buffer.drop_where("task", request.tasks)
    else:
        given = forgotten.raw if buffer.held["x"].dtype == torch.uint8 else forgotten.x
        if given is None:
            return ErasureOutcome(name, "reset", "the memory's samples are held in another form: it starts over")
        count = buffer.drop_samples(given)
    if not count:
        return ErasureOutcome(name, "not applicable", "its memory holds none of the forget set")
    rest = "; logits kept with the others come from models that had seen them" if "logits" in buffer.held else ""
    return ErasureOutcome(name, "erased", f"samples in its memory{rest}")
