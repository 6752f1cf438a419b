"""A run's model as one file that needs nothing else of the run: safetensors, with what it is in the file's header."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from fedcl import __version__
from fedcl.assembly import client_ids, client_runtime, make_model
from fedcl.base.files import write_bytes_atomic
from fedcl.client.local_data import PartitionedData
from fedcl.client.loop import owner
from fedcl.client.runtime import ClientRuntime
from fedcl.client.state import NEVER, MemoryStateStore
from fedcl.config.compose import Config, config_hash
from fedcl.config.instantiate import build
from fedcl.config.value_rules import ConfigError
from fedcl.contracts.requests import Forgotten
from fedcl.contracts.strategy import GLOBAL
from fedcl.messages import Request
from fedcl.models.fixed import every_tensor
from fedcl.models.flat import FlatModel
from fedcl.models.networks import Output, build_model
from fedcl.results.checkpoint import Checkpoints
from fedcl.results.launches import Trust, launched
from fedcl.runs.retrained import SilentRecord, inline
from fedcl.runs.setup import Setup, make_server
from fedcl.scenario.task import Stream
from fedcl.simulation.backend import open_backend
from fedcl.unlearning.certificate import model_digest

FORMAT = "fedcl-model-1"
_HEADER = "fedcl"  # the one key of the file's metadata; its value is JSON

# B = batch, C = logit columns, P = parameters and buffers


class ExportedModel(nn.Module):
    """A network as it left its run; in evaluation mode, on the CPU.

    Calling it with inputs (B, ...) gives logits (B, C), bit for bit those of the run's model. ``about`` is the header:
    ``classes`` (names by label), ``labels`` (of each logit column, -1 for none), ``normalisation``, ``tasks`` (each
    with ``classes``, their logit ``columns``, the ``mask`` of columns that a prediction may choose from, and its
    ``transform``), ``client``, ``round``, ``seed``, ``model`` (its part of the configuration), ``model_sha256``
    (of what is learned), ``base_digest`` (of what is fixed), ``config_sha256`` and ``fedcl``.
    """

    def __init__(self, network: nn.Module, about: Mapping[str, Any]) -> None:
        super().__init__()
        self.network, self.about = network, dict(about)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits (B, C) of normalised inputs."""
        return cast(Output, self.network(x)).logits

    def normalise(self, x: Tensor) -> Tensor:
        """Return raw inputs (B, ...), as the data source holds them, as the network takes them."""
        how = self.about["normalisation"]
        out = x.to(torch.float32) * how["scale"] if how["scale"] != 1.0 else x.to(torch.float32)
        if how["mean"] == [0.0] and how["std"] == [1.0]:
            return out
        shape = (1, -1) + (1,) * (out.ndim - 2)
        return (out - torch.tensor(how["mean"]).reshape(shape)) / torch.tensor(how["std"]).reshape(shape)

    @torch.no_grad()
    def predict(self, x: Tensor, task: int | None = None) -> Tensor:
        """Return the labels (B,) predicted for normalised inputs, int64.

        Parameters
        ----------
        x
            Inputs (B, ...).
        task
            The task they are from; None where all tasks choose among the same columns.

        Raises
        ------
        ValueError
            If there is no such task, or the tasks choose among different columns and none is named.
        """
        tasks = self.about["tasks"]
        known = [one["id"] for one in tasks]
        if task is not None and task not in known:
            raise ValueError(f"task={task}: must be one of {known}")
        if task is None and len({json.dumps(one["mask"]) for one in tasks}) > 1:
            raise ValueError(f"task=None: this model needs the task; it is one of {known}")
        mask = tasks[-1 if task is None else known.index(task)]["mask"]
        labels = torch.tensor(self.about["labels"], dtype=torch.int64)
        allowed = torch.arange(len(labels)) if mask is None else torch.tensor(mask)
        return labels[allowed[self(x)[:, allowed].argmax(1)]]


def export(run_dir: Path, client: str | None = None, out: Path | None = None, trust: Trust | None = None) -> Path:
    """Write a run's newest global model, or what a client predicts with, to one file and return its path.

    Parameters
    ----------
    run_dir
        The run's folder; its data must still be where they were.
    client
        None: the global model.
    out
        The file; ``model.safetensors`` or ``model_client_<id>.safetensors`` in the run's folder without it.
    trust
        Whose code the folder may run besides fedcl's.

    Raises
    ------
    ConfigError
        If the run has no checkpoint, or the client no model of its own that one network could be.
    """
    cfg = launched(run_dir, trust).cfg
    checkpoints = Checkpoints(run_dir)
    if not checkpoints.begun():
        raise ConfigError(f"{run_dir}: has no checkpoint to take a model from; checkpoint.every=0 writes none")
    state, states = checkpoints.load()
    setup = Setup.of(cfg)
    server = state["server"]
    vector = server["models"][GLOBAL]
    if client is not None:
        vector = _personal(cfg, setup, server, states, client)
    model = make_model(cfg, setup.dataset, setup.stream, torch.device("cpu"))
    model.load(vector)
    tensors = {name: tensor.detach().clone().contiguous() for name, tensor in every_tensor(model.module).items()}
    about = _about(cfg, setup, server, vector, client) | {"base_digest": model.base_digest}
    name = "model.safetensors" if client is None else f"model_client_{client}.safetensors"
    path = out or run_dir / name
    write_bytes_atomic(path, save(tensors, metadata={_HEADER: json.dumps(about)}))
    return path


def load_model(path: Path | str, *, trusted: Collection[str] = ()) -> ExportedModel:
    """Read a file that :func:`export` wrote.

    Parameters
    ----------
    path
        The file.
    trusted
        Top packages, besides fedcl's own, that the network's class may come from: a file names code, and none but this
        is run.

    Raises
    ------
    ValueError
        If the file is none of ours, is damaged, or its network is not to be trusted.
    """
    try:
        with safe_open(path, "pt") as file:  # type: ignore[no-untyped-call, unused-ignore]
            about = json.loads((file.metadata() or {}).get(_HEADER, "null"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read: {error}") from error
    if not isinstance(about, dict) or about.get("format") != FORMAT:
        raise ValueError(f"{path}: is no model exported by fedcl, or of another version than {FORMAT}")
    sizes = {"input_shape": tuple(about["input_shape"]), "heads": tuple(about["heads"])}
    network = build_model(functools.partial(build, about["model"], at="model", trusted=trusted, **sizes), seed=0)
    own = every_tensor(network)
    if own.keys() != tensors.keys():
        raise ValueError(f"{path}: lacks tensors of the network, as files of an earlier fedcl may: export it again")
    with torch.no_grad():
        for name, tensor in tensors.items():
            own[name].copy_(tensor)
    model = FlatModel(network)
    whole = model_digest({about["target"]: model.flat}), model.base_digest
    if whole != (about["model_sha256"], about.get("base_digest", "")):
        raise ValueError(f"{path}: its weights are not those it was written with")
    return ExportedModel(network.eval(), about).eval()


def _about(cfg: Config, setup: Setup, server: Mapping[str, Any], vector: Tensor, client: str | None) -> dict[str, Any]:
    dataset, stream = setup.dataset, setup.stream
    target = GLOBAL if client is None else client
    return {
        "format": FORMAT,
        "fedcl": __version__,
        "client": client,
        "target": target,
        "round": server["next_round"],
        "seed": cfg["seed"],
        "classes": list(dataset.classes),
        "input_shape": list(dataset.input_shape),
        "heads": list(stream.heads),
        # the weights are here: the file they began with may be missing
        "model": {key: None if key == "pretrained" else value for key, value in cfg["model"].items()},
        "normalisation": {"scale": dataset.scale, "mean": list(dataset.mean), "std": list(dataset.std)},
        "labels": _labels(stream),
        "tasks": _tasks(setup, stream, server["next_round"], client),
        "model_sha256": model_digest({target: vector}),
        "config_sha256": config_hash(cfg),
    }


def _labels(stream: Stream) -> list[int]:
    labels = [-1] * sum(stream.heads)
    for task in map(stream.train_task, range(stream.num_tasks)):
        for label, column in zip(task.classes, task.columns, strict=True):
            labels[column] = label
    return labels


def _tasks(setup: Setup, stream: Stream, rounds: int, client: str | None) -> list[dict[str, Any]]:
    """Return the tasks that were seen, as they are tested."""
    clients = setup.clients if client is None else (client,)
    seen = sorted({task for one in clients for task in setup.schedule.seen(one, max(rounds - 1, 0))})
    tested = [stream.test_task(task, after=seen) for task in seen]
    return [
        {
            "id": task.id,
            "classes": list(task.classes),
            "columns": list(task.columns),
            "mask": None if task.mask is None else list(task.mask),
            "transform": task.transform,
        }
        for task in tested
    ]


class _Standing(ClientRuntime):
    """A client's side that returns the weights it predicts with."""

    def weights(self, request: Request, store: MemoryStateStore) -> Tensor:
        """Return the vector (P,) of the one network whose logits are the client's predictions; ConfigError if none."""
        learner, ctx = self.enter(request, store)
        ctx.model.eval()
        predictor = owner(list(learner.values()), "predict")
        if predictor is None:
            return ctx.model.vector()
        passed: dict[str, Tensor] = {}

        def note(module: nn.Module, inputs: Any, output: Output) -> None:
            passed.update(weights=ctx.model.vector(), logits=output.logits)

        samples = ctx.data.x[:64]
        with ctx.model.module.register_forward_hook(note):
            logits = predictor.predict(ctx, samples)
        if not len(samples) or "logits" not in passed or not torch.equal(passed["logits"], logits):
            raise ConfigError(
                f"--client {request.client}: {type(predictor).__name__} does not predict with the logits of one network"
            )
        return passed["weights"]


def _personal(
    cfg: Config, setup: Setup, server: Mapping[str, Any], states: Mapping[str, tuple[int, Any]], client: str
) -> Tensor:
    """Return the weights (P,) that a client predicts with, where they are other ones than everybody's."""
    removed = Forgotten.of(server.get("unlearning", {}).get("forgotten", ())).clients
    if client not in setup.clients or client in removed:
        raise ConfigError(f"--client {client}: has left the run, or never was of it")
    visit = server["committed"].get(client, NEVER)
    if visit != NEVER and client not in states and cfg["backend"]["name"] == "flower":
        raise ConfigError(f"--client {client}: its state is on its own device")
    store = MemoryStateStore()
    if client in states:
        store.stage(client, visit, states[client][1])
        store.commit(client, visit)
    here = inline(cfg)
    with open_backend(here, setup.dataset, setup.partition) as backend:
        loop = make_server(here, setup, backend, cast(Any, SilentRecord()), evaluate=False)
        loop.state.models = dict(server["models"])
        loop.strategy.load_state_dict(server["strategy"])
        received = loop.model_of(client)
    last = max(server["next_round"] - 1, 0)
    seen = setup.schedule.seen(client, last)
    if not seen:
        raise ConfigError(f"--client {client}: has seen no task yet")
    data = PartitionedData(setup.dataset, setup.partition, client_ids(cfg))
    plain = client_runtime({**here, "device": "cpu"}, data)
    made = {field.name: getattr(plain, field.name) for field in dataclasses.fields(plain) if field.init}
    request = Request(
        "evaluate", client, visit, visit if client in states else NEVER, last, server["version"],
        setup.stream.test_task(seen[-1], after=seen), model=received, local_round=server["local_rounds"].get(client, 0),
    )  # fmt: skip
    vector = _Standing(**made).weights(request, store)
    if torch.equal(vector, server["models"][GLOBAL]):
        raise ConfigError(
            f"--client {client}: has no model of its own; what it uses is the global one, without --client"
        )
    return vector
