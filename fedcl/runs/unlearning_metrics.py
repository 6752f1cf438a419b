"""The unlearning metrics of a simulation, which sees what no server does: the samples of every client."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedcl.assembly import client_ids, device_of, make_model
from fedcl.base.randomness import numpy_generator, torch_generator
from fedcl.client.forgetting import part
from fedcl.client.local_data import PartitionedData, task_samples
from fedcl.config.compose import Config
from fedcl.config.value_rules import ConfigError
from fedcl.contracts.learner import TaskData
from fedcl.contracts.requests import ForgetInstruction, ForgetRequest, Forgotten
from fedcl.contracts.strategy import GLOBAL
from fedcl.data.dataset import Dataset, Indices
from fedcl.evaluation import relearning
from fedcl.evaluation.klom import ensemble_distance
from fedcl.evaluation.predictions import accuracy, margins, predict
from fedcl.evaluation.unlearning import PARTS, Part, backdoor, metrics
from fedcl.models.flat import FlatModel
from fedcl.runs.retrained import SimulatedEnsemble
from fedcl.runs.setup import Setup
from fedcl.scenario.task import Task
from fedcl.unlearning.service import Edit

Pairs = list[tuple[Task, TaskData]]
Sets = dict[Part, Pairs]
MAX_RETAINED = 2000  # retain samples that are measured: enough for a rate to half a percent


@dataclass
class SimulatedMetrics:
    """Measures the global model on the forget and the retain set of requests, train and test halves apart."""

    cfg: Config
    setup: Setup
    ensemble: SimulatedEnsemble
    _alike: dict[tuple[str, tuple[int, ...]], Pairs] = field(default_factory=dict, init=False, repr=False)

    # models are built when a request is measured: most runs never do

    @functools.cached_property
    def model(self) -> FlatModel:
        """The run's network; its weights are scratch."""
        return make_model(self.cfg, self.setup.dataset, self.setup.stream, device_of(self.cfg))

    @functools.cached_property
    def random(self) -> Tensor:
        """Weights (P,) that have learned nothing, drawn apart from the run's initial ones."""
        other = {**self.cfg, "seed": self.cfg["seed"] + 1}
        return make_model(other, self.setup.dataset, self.setup.stream, torch.device("cpu")).vector()

    def measure(self, edit: Edit) -> dict[str, float]:
        """Return the metrics of the edited model, and with prefixes the original's and the reference's own numbers."""
        if not edit.seen:
            return {}
        requests, earlier, reference = edit.requests, edit.earlier, edit.reference
        after, before = edit.after[GLOBAL], edit.before[GLOBAL]
        sets = self._sets(requests, edit.seen, earlier)
        targets: dict[Part, Tensor] = {
            name: torch.cat([data.y for _, data in data_of]) for name, data_of in sets.items() if data_of
        }
        now, was, random = (self._logits(sets, vector) for vector in (after, before, self.random))
        ideal = None if reference is None else self._logits(sets, reference[GLOBAL])
        models = {"": after, "original/": before}
        alike = self.ensemble.references(Forgotten([*earlier.requests, *requests]), edit.server_round)
        attack: dict[str, Any] = {
            "shadows": [self._logits(sets, vector) for vector in alike],
            "holdout": "forget_test" if sets["forget_test"] else "retain_test",
        }
        numbers = metrics(targets, now, original=was, reference=ideal, random=random, **attack)
        numbers |= {f"original/{name}": value for name, value in metrics(targets, was, **attack).items()}
        if ideal is not None and reference is not None:
            models["reference/"] = reference[GLOBAL]
            own = metrics(targets, ideal, original=was, random=random, **attack)
            numbers |= {f"reference/{name}": value for name, value in own.items()}
        for prefix, vector in models.items():
            behind = self._behind(requests, sets, vector, numbers.get("original/forget_test_accuracy"))
            numbers |= {f"{prefix}{name}": value for name, value in behind.items()}
        numbers |= self._backdoor(models, edit.seen, earlier)
        numbers |= _gaps(numbers, ("relearn_steps", "retain_relearned", "linear_probe", "backdoor"))
        others = None if reference is None else self.ensemble.others(requests, earlier, edit.server_round)
        if reference is not None and others is not None:
            numbers |= self._klom(sets, targets, [after, *others[0]], [reference[GLOBAL], *others[1]])
        return {name: value for name, value in numbers.items() if not np.isnan(value)}

    def revival(self, requests: Sequence[ForgetRequest], model: Tensor, seen: Sequence[int]) -> dict[str, float]:
        """Return the accuracy of ``model`` (P,) on what each of ``requests`` wanted forgotten, by request id."""
        found = {}
        for request in requests:
            key = (request.id, tuple(seen))
            if key not in self._alike:  # used at every evaluation, and the same until the next task
                sets = self._sets([request], seen, Forgotten())
                self._alike[key] = sets["forget_test"] or sets["forget_train"]
            if pairs := self._alike[key]:
                logits = self._logits({"forget_test": pairs}, model)["forget_test"]
                found[request.id] = accuracy(logits, torch.cat([data.y for _, data in pairs]))
        return found

    # -- samples ------------------------------------------------------------------------------------------------------

    def _sets(self, requests: Sequence[ForgetRequest], seen: Sequence[int], earlier: Forgotten) -> Sets:
        """Return (task as it is tested now, samples) of the four sets, without what was forgotten ``earlier``."""
        setup, device = self.setup, self.model.device
        tasks = [self._task(task_id, seen) for task_id in seen]
        ids = client_ids(self.cfg)
        data = PartitionedData(setup.dataset, setup.partition, ids)
        sets: Sets = {name: [] for name in PARTS}
        for client in (client for client in ids if client not in earlier.clients):
            note = ForgetInstruction(tuple(requests), tuple(earlier.task(client, task) for task in tasks))
            for task, forgotten, kept in part(data, client, note, device):
                sets["forget_train"].append((task, forgotten))
                sets["retain_train"].append((task, kept))
        for task in tasks:
            like, other = self._test(task, requests, earlier, device)
            sets["forget_test"].append((task, like))
            sets["retain_test"].append((task, other))
        filled: Sets = {name: [(t, d) for t, d in pairs if len(d)] for name, pairs in sets.items()}
        filled["retain_train"] = self._fewer(filled["retain_train"])
        return filled

    def _task(self, task_id: int, seen: Sequence[int]) -> Task:
        stream = self.setup.stream
        return replace(stream.train_task(task_id), mask=stream.test_task(task_id, after=seen).mask)

    def _test(
        self, task: Task, requests: Sequence[ForgetRequest], earlier: Forgotten, device: torch.device
    ) -> tuple[TaskData, TaskData]:
        """Return the test samples of ``task`` that are like the forget set, and the others but those like it before."""
        partition, dataset = self.setup.partition, self.setup.dataset
        everything: Indices = np.arange(len(dataset.test.y))
        departing_clients = Forgotten(list(requests)).clients
        own = [partition.test[i] for i in range(len(partition.test)) if str(i) in departing_clients]
        mine = np.isin(everything, np.concatenate(own)) if own else np.zeros(len(everything), bool)
        mine |= np.isin(dataset.test.y, [label for request in requests for label in request.classes])
        if any(task.id in request.tasks for request in requests):
            mine[:] = True
        was = [label for request in earlier.requests for label in request.classes]
        if any(task.id in request.tasks for request in earlier.requests):
            was += task.classes
        other = ~mine & ~np.isin(dataset.test.y, was)
        return self._held(everything[mine], task, device), self._held(everything[other], task, device)

    def _held(self, positions: Indices, task: Task, device: torch.device, dataset: Dataset | None = None) -> TaskData:
        dataset = self.setup.dataset if dataset is None else dataset
        return task_samples(dataset, dataset.test, positions, replace(task, portions=None), device)

    def _fewer(self, pairs: list[tuple[Task, TaskData]]) -> list[tuple[Task, TaskData]]:
        """Return a random part of many samples, always the same."""
        total = sum(len(data) for _, data in pairs)
        if total <= MAX_RETAINED:
            return pairs
        kept = np.zeros(total, bool)
        kept[numpy_generator(self.cfg["seed"], "panel").choice(total, MAX_RETAINED, replace=False)] = True
        fewer, start = [], 0
        for task, data in pairs:
            rows = torch.from_numpy(kept[start : start + len(data)]).to(data.y.device)
            start += len(data)
            if bool(rows.any()):
                fewer.append((task, TaskData(data.x[rows], data.y[rows])))
        return fewer

    # -- models -------------------------------------------------------------------------------------------------------

    def _logits(self, sets: Sets, vector: Tensor) -> dict[Part, Tensor]:
        return {
            name: torch.cat([predict(self.model, vector, data.x, columns=task.mask).logits for task, data in pairs])
            for name, pairs in sets.items()
            if pairs
        }

    def _behind(
        self, requests: Sequence[ForgetRequest], sets: Sets, vector: Tensor, original: float | None
    ) -> dict[str, float]:
        """Return what outputs do not show of forgotten classes: accuracy of a linear classifier, steps to relearn."""
        if original is None or not sets["forget_test"] or any(request.scope != "class" for request in requests):
            return {}
        features = {
            name: relearning.Samples(
                torch.cat([predict(self.model, vector, data.x).features for _, data in sets[name]]),
                _samples(sets[name]).y,
            )
            for name in PARTS
            if sets[name]
        }
        train = [features[name] for name in ("forget_train", "retain_train") if name in features]
        joined = relearning.Samples(torch.cat([s.x for s in train]), torch.cat([s.y for s in train]))
        numbers = {"linear_probe": relearning.linear_probe(joined, features["forget_test"])}
        masks = {task.mask for task, _ in sets["forget_test"]}
        # where tasks have several masks, no one set of columns is right for all samples
        return numbers | (self._relearned(sets, vector, original, masks.pop()) if len(masks) == 1 else {})

    def _relearned(
        self, sets: Sets, vector: Tensor, original: float, columns: tuple[int, ...] | None
    ) -> dict[str, float]:
        seed, training = self.cfg["seed"], relearning.Training(columns=columns)
        forget, test = _samples(sets["forget_train"]), _samples(sets["forget_test"])
        steps = relearning.relearn_steps(
            self.model,
            vector,
            forget,
            test,
            original_accuracy=original,
            generator=torch_generator(seed, "relearn"),
            training=training,
        ).steps
        if not sets["retain_train"]:
            return {"relearn_steps": float(steps)}
        retain, generator = _samples(sets["retain_train"]), torch_generator(seed, "relearn from retain")
        curve = relearning.relearn_from_retain(self.model, vector, retain, test, generator=generator, training=training)
        return {"relearn_steps": float(steps), "retain_relearned": curve[-1]}

    def _backdoor(self, models: Mapping[str, Tensor], seen: Sequence[int], earlier: Forgotten) -> dict[str, float]:
        """Return how often ``unlearning.trigger`` works, and how much of the accuracy on its victims is recovered."""
        trigger = self.cfg["unlearning"]["trigger"]
        if not trigger["pixels"]:
            return {}
        dataset = marked(self.setup.dataset, trigger)
        everything: Indices = np.arange(len(dataset.test.y))
        removed = [label for request in earlier.requests for label in request.classes]
        everything = everything[~np.isin(dataset.test.y, removed)]
        tasks = [self._task(task_id, seen) for task_id in seen]
        pairs = [(task, self._held(everything, task, self.model.device, dataset)) for task in tasks]
        sets: Sets = {"retain_test": [pair for pair in pairs if len(pair[1])]}
        if not sets["retain_test"]:
            return {}
        targets = torch.cat([data.y for _, data in sets["retain_test"]])
        logits = {prefix: self._logits(sets, vector)["retain_test"] for prefix, vector in models.items()}
        return backdoor(logits, targets, int(trigger["label"]))

    def _klom(
        self, sets: Sets, targets: Mapping[Part, Tensor], unlearned: list[Tensor], retrained: list[Tensor]
    ) -> dict[str, float]:
        """Return how far the margins of the two ensembles are apart on each set."""
        both: list[dict[Part, Tensor]] = []
        for vectors in (unlearned, retrained):
            logits = [self._logits(sets, vector) for vector in vectors]
            both.append({name: torch.stack([margins(one[name], targets[name]) for one in logits]) for name in targets})
        unlearned_margins, oracle_margins = ({str(name): m for name, m in one.items()} for one in both)
        return ensemble_distance(unlearned_margins, oracle_margins)


def _samples(pairs: Pairs) -> relearning.Samples:
    return relearning.Samples(torch.cat([data.x for _, data in pairs]), torch.cat([data.y for _, data in pairs]))


def _gaps(numbers: Mapping[str, float], names: Sequence[str]) -> dict[str, float]:
    there = [name for name in names if f"reference/{name}" in numbers]
    return {f"gap/{name}": abs(numbers[name] - numbers[f"reference/{name}"]) for name in there}


def marked(dataset: Dataset, trigger: Mapping[str, Any]) -> Dataset:
    """Return ``dataset`` with ``trigger["pixels"]`` of every test sample (places in it, flattened) at its ``value``.

    Raises
    ------
    ConfigError
        If the trigger does not fit the samples.
    """
    place, size = "unlearning.trigger", int(np.prod(dataset.input_shape))
    pixels, label = trigger["pixels"], trigger["label"]
    if any(type(p) is not int or not 0 <= p < size for p in pixels):
        raise ConfigError(f"{place}.pixels={pixels}: must be places in 0..{size - 1}")
    if label >= dataset.num_classes:
        raise ConfigError(f"{place}.label={label}: must be in 0..{dataset.num_classes - 1}")
    x, value = dataset.test.x.copy(), trigger["value"]
    most = np.iinfo(str(x.dtype)).max if x.dtype.kind in "iu" else None
    if most is not None and not value <= most:
        raise ConfigError(f"{place}.value={value}: must be <= {most}, the largest of {x.dtype} samples")
    x.reshape(len(x), size)[:, list(pixels)] = value
    return replace(dataset, test=replace(dataset.test, x=x))
