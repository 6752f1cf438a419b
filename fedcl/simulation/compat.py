"""Every touch of Flower's private parts, in one place, with what breaks when Flower moves them.

The server's own process, :mod:`fedcl.deploy.superlink`, touches what SuperLink is made of.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from flwr.app import Error, Message, Metadata, RecordDict

SUPPORTED = "flwr >=1.41,<1.42"
CLIENT_RAISED = 2  # flwr.common.constant.ErrorCode.CLIENT_APP_RAISED_EXCEPTION
NODE_UNAVAILABLE = 5  # ErrorCode.NODE_UNAVAILABLE
CLIENT_CRASHED = 8  # ErrorCode.CLIENT_APP_CRASHED

# Nothing of a simulation may phone home, look for updates or install packages behind the user's back.
ENVIRONMENT = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}


def quiet_environment() -> None:
    """Set Flower's and Ray's switches for this process and its children, and keep Flower's log to warnings."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    logging.getLogger("flwr").setLevel(logging.WARNING)


@contextmanager
def identity(run_id: int, node_id: int = 1) -> Iterator[None]:
    """Let this process build Flower messages for ``run_id``.

    Raises
    ------
    ImportError
        If this Flower keeps the identity of a process somewhere else.
    """
    try:
        from flwr.supercore.task_identity import TaskIdentity
    except ImportError as error:
        raise ImportError(f"this version of Flower is not supported, install {SUPPORTED}") from error
    saved = (TaskIdentity._run_id, TaskIdentity._node_id, TaskIdentity._task_id)
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = run_id, node_id, 1
    try:
        yield
    finally:
        TaskIdentity._run_id, TaskIdentity._node_id, TaskIdentity._task_id = saved


def message_with(metadata: Metadata, outcome: RecordDict | Error) -> Message:
    """Return a message with ``metadata`` of our own, an argument that Flower keeps for its own grids."""
    build: Any = Message
    named = {"error": outcome} if isinstance(outcome, Error) else {"content": outcome}
    message: Message = build(metadata=metadata, **named)
    return message


def reply_message(sent: Metadata, message_id: str, label: str, source: int, outcome: RecordDict | Error) -> Message:
    """Return a reply from the node ``source`` to the message ``sent`` with the id ``message_id``.

    ``label`` makes the reply's own id.
    """
    metadata = Metadata(
        run_id=sent.run_id,
        message_id=f"{message_id}/{label}",
        src_node_id=source,
        dst_node_id=sent.src_node_id,
        reply_to_message_id=message_id,
        group_id=sent.group_id,
        created_at=time.time(),
        ttl=sent.ttl,
        message_type=sent.message_type,
    )
    return message_with(metadata, outcome)


def set_source(message: Message, node_id: int) -> None:
    """Let ``message`` come from ``node_id``; Flower has a setter for the destination only."""
    message.metadata.__dict__["_src_node_id"] = node_id


def empty_run(run_id: int) -> Any:
    """Return the object that ``Grid.run`` is declared to give."""
    from flwr.supercore.run import Run

    return Run.create_empty(run_id)
