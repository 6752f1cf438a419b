"""The client half of the Flower app: a visit is the same code here as in a simulation.

Needs the base dependencies only. What a client does is composed from its own copy of the configuration; the server
sends names and numbers, never code. A SuperNode started with ``--node-config 'spec="/path/client.yaml"'`` is a device
with data and state of its own; without, it is one of Flower's simulated nodes.
"""

from __future__ import annotations

import functools
import json
import shlex
from collections.abc import Sequence
from pathlib import Path

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from fedcl import __version__
from fedcl.assembly import client_ids, client_runtime, load_dataset, split_dataset
from fedcl.base.interruption import client_fault
from fedcl.base.tree import pack, unpack
from fedcl.client.device import Agreement, DeviceData, DeviceSpec, device_overrides, read_spec, refuse_foreign_targets
from fedcl.client.device import relabel as with_global_labels
from fedcl.client.device_state import DeviceStateStore
from fedcl.client.local_data import PartitionedData
from fedcl.client.runtime import ClientRuntime
from fedcl.client.state import NEVER
from fedcl.config.compose import Config
from fedcl.config.instantiate import targets_in
from fedcl.config.own_code import add_plugin_paths
from fedcl.contracts.learner import State
from fedcl.contracts.requests import ErasureOutcome, ForgetInstruction, outcomes_json
from fedcl.messages import CHANGES_STATE, Reply, Request, content_bytes, hello_reply, reply_content, requests
from fedcl.messages.arrays import record_tensors, tensors_record

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
    from fedcl.config.compose import compose

    torch.set_num_threads(1)
    cfg = compose(shlex.split(overrides))
    dataset = load_dataset(cfg)
    clients = client_ids(cfg)
    return client_runtime(cfg, PartitionedData(dataset, split_dataset(cfg, dataset), clients))


@app.train()
@app.evaluate()
@app.query()
def answer(message: Message, context: Context) -> Message:
    """Answer any message of a fedcl server: whatever ends here is an error reply, never the app's process."""
    try:
        return _answer(message, context)
    except BaseException as error:
        raise client_fault(error) from error


def _answer(message: Message, context: Context) -> Message:
    spec = context.node_config.get("spec")
    if spec is not None:
        return on_device(message, context, read_spec(Path(str(spec))))
    runtime = _runtime(str(context.run_config.get("overrides", "")))
    client = str(context.node_config["partition-id"])
    request = next(requests(message.content))
    if request.kind == "hello":
        return Message(_hello(client, runtime), reply_to=message)
    if request.client != client:
        raise ValueError(f"the message is for client {request.client!r}, this is client {client!r}")
    store = ContextStateStore(context)
    if request.kind in CHANGES_STATE:
        store.commit(client, request.committed)
    return Message(reply_content(runtime.visit(request, store), live=False), reply_to=message)


def on_device(message: Message, context: Context, spec: DeviceSpec) -> Message:
    """Answer a message on a device with data and state of its own.

    Raises
    ------
    ValueError
        If the message is too large, for somebody else, or was here before; ConfigError if the device is not set up.
    """
    size = content_bytes(message.content)
    if size > spec.max_message_bytes:
        allowed = spec.max_message_bytes >> 20
        raise ValueError(f"client {spec.client}: a message of {size} bytes; max_message_mb={allowed} in client.yaml")
    asked = list(requests(message.content))
    if len(asked) != 1:
        raise ValueError(f"client {spec.client}: a message for {len(asked)} clients; a device is one")
    request, run = asked[0], str(context.run_config.get("run", "")) or f"run-{context.run_id}"
    sent = str(context.run_config.get("overrides", ""))
    store = DeviceStateStore(spec.state, run, spec.client)
    if request.kind == "hello" and store.has_left():  # the server may still have to know that it is here
        base = Agreement.from_json(request.note).base  # it holds no model that could have another
        return Message(hello_reply(spec.client, 0, __version__, base), reply_to=message)
    if request.kind == "hello":
        agreed = Agreement.from_json(request.note)
        reply = _hello(spec.client, _device_runtime(_device_config(sent, spec, store), spec, agreed))
        store.agree(agreed.to_json())
        return Message(reply, reply_to=message)
    if request.client != spec.client:
        raise ValueError(f"the message is for client {request.client!r}, this is client {spec.client!r}")
    if request.kind == "forget" and ForgetInstruction.from_json(request.note).leaves(spec.client):
        store.drop(spec.client)  # as often as it is told: the answer may have been lost
        erased = ErasureOutcome("client state", "erased", "the client has left")
        return Message(reply_content(Reply(0, note=outcomes_json([erased])), live=False), reply_to=message)
    store.refuse_if_left()
    runtime = _device_runtime(_device_config(sent, spec, store), spec, Agreement.from_json(store.agreed()))
    return Message(_visit(runtime, store, request, int(context.run_config.get("attempt", 0))), reply_to=message)


def _hello(client: str, runtime: ClientRuntime) -> RecordDict:
    return hello_reply(client, runtime.data.num_examples(client), __version__, runtime.model.base_digest)


def _visit(runtime: ClientRuntime, store: DeviceStateStore, request: Request, attempt: int) -> RecordDict:
    if request.kind in CHANGES_STATE:
        store.enter(attempt, request.visit)
        store.commit(request.client, request.committed)
    reply = runtime.visit(request, store)
    if request.kind == "forget":
        store.forgot(request.visit)
    return reply_content(reply, live=False)


def _device_config(sent: str, spec: DeviceSpec, store: DeviceStateStore) -> Config:
    """Return the run's configuration, composed from this device's own copy when the run first spoke to it."""
    if spec.config_dirs:
        add_plugin_paths(spec.config_dirs)
    key = json.dumps([sent, repr(spec), _stamps(spec.config_dirs), __version__])
    kept = store.kept_config(key)
    if kept is not None:
        return kept
    from fedcl.config.compose import CONFIG_DIR, compose, path_keys

    cfg = compose(device_overrides(shlex.split(sent), spec, path_keys), spec.config_dirs)
    if not spec.trusted_packages:
        refuse_foreign_targets(targets_in(cfg), [CONFIG_DIR, *spec.config_dirs])
    store.keep_config(key, cfg)
    return cfg


def _stamps(folders: Sequence[Path]) -> list[tuple[str, int, int]]:
    """Return what changes when a file in ``folders`` does."""
    stats = {str(file): file.stat() for folder in folders for file in sorted(folder.rglob("*.yaml"))}
    return [(name, stat.st_mtime_ns, stat.st_size) for name, stat in stats.items()]


def _device_runtime(cfg: Config, spec: DeviceSpec, agreed: Agreement) -> ClientRuntime:
    """Build what runs this device's visits."""
    torch.set_num_threads(spec.threads)
    agreed.check(spec)
    dataset = load_dataset(cfg)
    if spec.data is not None:
        dataset = with_global_labels(dataset, agreed, spec.client)
        return client_runtime(cfg, DeviceData(dataset, spec.client))
    clients = client_ids(cfg)
    if spec.client not in clients:
        raise ValueError(f"client {spec.client}: the run's clients are {clients[0]} to {clients[-1]}")
    return client_runtime(cfg, PartitionedData(dataset, split_dataset(cfg, dataset), clients))
