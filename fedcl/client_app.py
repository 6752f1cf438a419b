"""The client half of the Flower app: a visit is the same code here as in a simulation.

Needs the base dependencies only. What a client does is composed from its own copy of the configuration; the server
sends names and numbers, never code.
"""

from __future__ import annotations

import functools
import json
import shlex

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message
from flwr.clientapp import ClientApp

from fedcl import __version__
from fedcl.client.plugin import State
from fedcl.client.runtime import ClientRuntime
from fedcl.client.state import NEVER
from fedcl.config import compose
from fedcl.messages import CHANGES_STATE, hello_reply, record_tensors, reply_content, requests, tensors_record
from fedcl.tree import pack, unpack
from fedcl.wiring import client_ids, client_runtime, load_dataset, simulated_data, split_dataset

app = ClientApp()


class ContextStateStore:
    """Client state in Flower's ``Context.state``: one record of values and one of tensors for each visit kept."""

    def __init__(self, context: Context) -> None:
        self._records = context.state

    def load(self, client: str, visit: int) -> State:
        """Return the state staged by ``visit``."""
        if visit == NEVER:
            return {}
        values = self._records.config_records[f"values-{visit}"]
        tensors = {
            name: t.clone() for name, t in record_tensors(self._records.array_records[f"tensors-{visit}"]).items()
        }
        state: State = unpack(json.loads(str(values["tree"])), tensors)
        return state

    def stage(self, client: str, visit: int, state: State) -> None:
        """Keep ``state`` beside the committed one."""
        tree, tensors = pack(state)
        self._records[f"values-{visit}"] = ConfigRecord({"tree": json.dumps(tree)})
        self._records[f"tensors-{visit}"] = tensors_record(tensors, live=False) if tensors else ArrayRecord()

    def has(self, client: str, visit: int) -> bool:
        """Whether ``visit``'s state is here."""
        return visit == NEVER or f"values-{visit}" in self._records

    def drop(self, client: str) -> None:
        """Erase everything."""
        self._records.clear()

    def commit(self, client: str, visit: int) -> None:
        """Drop every state but that of ``visit``."""
        keep = {f"values-{visit}", f"tensors-{visit}"}
        for name in [name for name in self._records if name not in keep]:
            del self._records[name]


@functools.lru_cache(maxsize=2)
def _runtime(overrides: str) -> ClientRuntime:
    """Build what runs visits: once a process, not once a message."""
    torch.set_num_threads(1)
    cfg = compose(shlex.split(overrides))
    dataset = load_dataset(cfg)
    clients = client_ids(cfg)
    return client_runtime(cfg, simulated_data(dataset, split_dataset(cfg, dataset), clients), dataset)


@app.train()
@app.evaluate()
@app.query()
def answer(message: Message, context: Context) -> Message:
    """Answer any message of a fedcl server."""
    runtime = _runtime(str(context.run_config.get("overrides", "")))
    client = str(context.node_config["partition-id"])
    request = next(requests(message.content))
    if request.kind == "hello":
        return Message(hello_reply(client, runtime.data.num_examples(client), __version__), reply_to=message)
    if request.client != client:
        raise ValueError(f"the message is for client {request.client!r}, this is client {client!r}")
    store = ContextStateStore(context)
    if request.kind in CHANGES_STATE:
        store.commit(client, request.committed)
    return Message(reply_content(runtime.visit(request, store), live=False), reply_to=message)
