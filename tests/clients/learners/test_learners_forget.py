"""What a learner remembers of samples that are to be forgotten, byte for byte."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from clients.learners.er import ER
from clients.learners.view_batch import ViewBatch
from fedcl.assembly import learner_factories
from fedcl.base.tree import pack
from fedcl.client.buffer import ReplayBuffer
from fedcl.client.erasing import erase
from fedcl.config.compose import compose, list_choices
from fedcl.contracts.learner import Plugin, TaskData
from fedcl.contracts.requests import ForgetInstruction, ForgetRequest, Scope, outcomes_from
from fedcl.data.dataset import Dataset
from fedcl.messages import Request
from fedcl.scenario.domains import DomainPermuted
from fedcl.scenario.streams import ClassIncremental
from tests.toy import configure, run_toy, write_files

CPU = torch.device("cpu")
MARKED = 0  # a sample of class 0
OTHER = 1


def _factories(name: str) -> Mapping[str, Callable[[], Plugin]]:
    return learner_factories(compose([f"learner={name}", "compare_with=null"]))


def _holds_samples(plugin: Plugin) -> bool:
    return any(isinstance(value, ReplayBuffer) for value in vars(plugin).values())


LEARNERS = [name for name, _ in list_choices("learner")]
HOLDERS = [name for name in LEARNERS if any(_holds_samples(build()) for build in _factories(name).values())]


def contains(tree: Any, wanted: Tensor) -> bool:
    """Whether the bytes of ``wanted`` are anywhere in a state, as it would be written to disk."""
    written, tensors = pack(tree)
    needle = wanted.contiguous().numpy().tobytes()
    return any(needle in tensor.contiguous().numpy().tobytes() for tensor in tensors.values()) or (
        str(wanted.flatten()[0].item()) in json.dumps(written)
    )


def ask(client: Any, request: ForgetRequest) -> list[Any]:
    """Send a request to the client as the server does, with the tasks it has met."""
    tasks = tuple(client.stream.train_task(task) for task in range(2))
    note = ForgetInstruction((request,), tasks)
    model = client.runtime.model.vector()
    message = Request(
        "forget", "0", client.visit, client.committed, 0, 0, tasks[-1], model=model, note=note.to_json()
    )  # fmt: skip
    reply = client.runtime.visit(message, client.store)
    client.store.commit("0", client.visit)
    client.committed, client.visit = client.visit, client.visit + 1
    return outcomes_from(reply.note)


SCRIPT = [("train", 0), ("task_end", 0), ("train", 1), ("task_end", 1)]


def test_there_are_learners_that_hold_samples() -> None:
    assert {"er", "er_ace", "der", "derpp", "agem", "gdumb", "uer", "fpf", "k_fpf"} <= set(HOLDERS)


@pytest.mark.parametrize("scenario", [ClassIncremental, DomainPermuted])
@pytest.mark.parametrize("name", HOLDERS)
def test_a_sample_is_erased_and_the_others_stay(
    blobs: Dataset, make_client: Callable[..., Any], name: str, scenario: type[Any]
) -> None:
    blobs = replace(blobs, train=replace(blobs.train, x=blobs.train.x.copy()))  # others are given the same arrays
    blobs.train.x[MARKED] = 271828.0 + np.arange(8)
    blobs.train.x[OTHER] = 314159.0 + np.arange(8)
    made = scenario(num_classes=6, input_shape=blobs.input_shape, seed=0, num_tasks=3)
    client = make_client(blobs, made, _factories(name), lr=1e-6)
    list(client.run(SCRIPT))
    whole = client.store.load("0", client.committed)
    seen = [  # the sample as the model is shown it, in each task
        data.x[data.positions == position]
        for position in (MARKED, OTHER)
        for task in range(2)
        for data in [client.runtime.data.train("0", made.train_task(task), CPU)]
    ]
    marked = [rows[0] for rows in seen[:2] if len(rows)]
    others = [rows[0] for rows in seen[2:] if len(rows)]
    assert marked
    assert any(contains(whole, sample) for sample in marked)
    outcomes = ask(client, ForgetRequest("r", "sample", samples=(MARKED,)))
    assert "erased" in [residual.outcome for residual in outcomes]
    left = client.store.load("0", client.committed)
    assert not any(contains(left, sample) for sample in marked)
    assert any(contains(left, sample) for sample in others)
    list(client.run([("train", 1), ("train", 2), ("task_end", 2)]))  # and it can go on


@pytest.mark.parametrize("scope", ["class", "task"])
@pytest.mark.parametrize("name", HOLDERS)
def test_a_class_or_a_task_is_erased(blobs: Dataset, make_client: Callable[..., Any], name: str, scope: Scope) -> None:
    made = ClassIncremental(num_classes=6, input_shape=blobs.input_shape, seed=0, num_tasks=3)
    client = make_client(blobs, made, _factories(name))
    list(client.run(SCRIPT))
    first = made.train_task(0)
    gone = {"class": first.columns[:1], "task": first.columns}[scope]
    named = {"class": {"classes": first.classes[:1]}, "task": {"tasks": (0,)}}[scope]
    request = ForgetRequest("r", scope, **named)  # type: ignore[arg-type]

    def targets() -> set[int]:
        _, tensors = pack(client.store.load("0", client.committed))
        return {label for path, y in tensors.items() if path.endswith("/y") for label in y.tolist()}

    assert targets() == set(first.columns) | set(made.train_task(1).columns)
    ask(client, request)
    assert targets() == (set(first.columns) | set(made.train_task(1).columns)) - set(gone)


@pytest.mark.parametrize("name", LEARNERS)
def test_every_learner_answers_and_goes_on(blobs: Dataset, make_client: Callable[..., Any], name: str) -> None:
    made = ClassIncremental(num_classes=6, input_shape=blobs.input_shape, seed=0, num_tasks=3)
    client = make_client(blobs, made, _factories(name))
    list(client.run(SCRIPT))
    outcomes = ask(client, ForgetRequest("r", "class", classes=(made.train_task(0).classes[0],)))
    keeps = [r for r in outcomes if r.outcome != "not applicable"]
    assert all(r.outcome in ("erased", "reset", "recomputed") for r in keeps)
    models = list(client.run([("train", 1), ("train", 2), ("task_end", 2)]))
    assert all(bool(torch.isfinite(model).all()) for model in models)


def test_views_of_samples_are_not_what_is_kept(blobs: Dataset, make_client: Callable[..., Any]) -> None:
    """Augmented copies could not be told by their content."""
    made = ClassIncremental(num_classes=6, input_shape=blobs.input_shape, seed=0, num_tasks=3)
    plugins = {"view_batch": partial(ViewBatch, repeats=2), "er": partial(ER, budget=200)}
    client = make_client(blobs, made, plugins)
    list(client.run([("train", 0), ("train", 1)]))
    held = client.state["er"]["x"]
    originals = torch.cat([client.runtime.data.train("0", made.train_task(task), CPU).x for task in range(2)])
    assert all(bool((originals == row).all(1).any()) for row in held)


def test_samples_in_another_form_cannot_be_told(blobs: Dataset) -> None:
    buffer, generator = ReplayBuffer(4), torch.Generator().manual_seed(0)
    raw = torch.arange(8, dtype=torch.uint8).view(4, 2)
    buffer.add(raw.float() / 255, torch.zeros(4, dtype=torch.long), 0, generator, raw=raw)
    request, x = ForgetRequest("r", "sample", samples=(0,)), raw[:1].float() / 255
    assert erase(buffer, ER(), request, TaskData(x, torch.zeros(1, dtype=torch.long))).outcome == "reset"
    assert len(buffer) == 4
    known = TaskData(x, torch.zeros(1, dtype=torch.long), raw[:1])
    assert erase(buffer, ER(), request, known).outcome == "erased"
    assert erase(buffer, ER(), request, known).outcome == "not applicable"
    assert buffer.held["x"].tolist() == raw[1:].tolist()
    with pytest.raises(ValueError, match=r"torch\.float32 \(2,\); those held"):
        buffer.drop_samples(x)


def test_a_run_erases_it_at_the_client_that_holds_it(tmp_path: Path) -> None:
    files = write_files(tmp_path)
    with np.load(files["npz"]) as archive:
        arrays = dict(archive)
    marker = np.random.default_rng(1).integers(0, 256, (16, 16), dtype=np.uint8)
    arrays["x_train"][MARKED] = marker
    np.savez(files["npz"], **arrays)
    request = f"unlearning.requests=[{{id: a, scope: sample, samples: [{MARKED}], at: {{round: 3}}}}]"
    extra = ["learner.er.budget=200", f"unlearning.cache={tmp_path}", "unlearning.reference=false"]
    cfg = configure({"learner": "er", "unlearner": "continue_without"}, files, CPU, request, *extra)
    diary = run_toy(cfg, until=3)
    before, after = diary.saved[3]["clients"], diary.saved[4]["clients"]
    wanted = torch.from_numpy(marker)
    assert sum(contains(state, wanted) for _, state in before.values()) == 1
    assert not any(contains(state, wanted) for _, state in after.values())
    assert diary.faults == []
