"""Erasing a forget set from a replay buffer, and what to say of it."""

from __future__ import annotations

import torch

from fedcl.client.buffer import ReplayBuffer
from fedcl.contracts.learner import Plugin, TaskData
from fedcl.contracts.requests import ErasureOutcome, ForgetRequest


def erase(buffer: ReplayBuffer, owner: Plugin, request: ForgetRequest, gone: TaskData) -> ErasureOutcome:
    """Erase what ``buffer`` holds of the samples ``gone``, or of the tasks that ``request`` names, for its ``owner``.

    Samples are told by their content, so equal ones go together; of a task only what was met in it goes. Where samples
    are held in a form that ``gone`` does not have, the outcome is ``reset``. The words have no number in them: a
    certificate joins the answers of all clients that say the same.
    """
    name = type(owner).__name__
    if not len(buffer):
        return ErasureOutcome(name, "not applicable", "holds no samples")
    if request.scope == "task":
        count = buffer.drop_where("task", request.tasks)
    else:
        given = gone.raw if buffer.held["x"].dtype == torch.uint8 else gone.x
        if given is None:
            return ErasureOutcome(name, "reset", "the memory's samples are held in another form: it starts over")
        count = buffer.drop_samples(given)
    if not count:
        return ErasureOutcome(name, "not applicable", "its memory holds none of the forget set")
    rest = "; logits kept with the others come from models that had seen them" if "logits" in buffer.held else ""
    return ErasureOutcome(name, "erased", f"samples in its memory{rest}")
