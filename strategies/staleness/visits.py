"""Late clients' local rounds as the server can simulate them: how many steps, which batches, which columns."""

from __future__ import annotations

import torch
from torch import Tensor

from fedcl.contracts.strategy import LocalWork, Update
from fedcl.contracts.view import ServerView
from strategies.staleness.inversion import Simulation, Variant, batch_plan, trainable

# P = parameters, N = made-up samples, C = allowed columns


class Visits:
    """What a server knows of its clients' training, with at most ``samples`` made-up samples in place of theirs.

    Takes a model of its own to simulate with; dropout is off in it.
    """

    def __init__(self, work: LocalWork, samples: int, variant: Variant) -> None:
        self.model = work.model.copy()
        self.model.eval()
        self.model.set_generator(None)
        self.trained = trainable(self.model)
        self.device = self.model.device
        self.training, self.stream, self.input_shape = work.training, work.stream, work.input_shape
        self.samples, self.variant = samples, variant

    def rows(self, update: Update) -> int:
        """Return N: never more than the client has samples of its own."""
        return min(self.samples, update.num_examples)

    def epoch(self, update: Update) -> int:
        """Return the steps of an epoch."""
        return -(-update.num_examples // self.training.batch_size)

    def steps(self, update: Update) -> int:
        """Return the number of steps of the local round."""
        return self.epoch(update) * self.training.epochs

    def shape(self, update: Update) -> tuple[int, ...]:
        """Return what two local rounds must share to be simulated together."""
        # with several batches an epoch their sizes follow from the number of samples
        return update.task, self.rows(update), update.num_examples if self.epoch(update) > 1 else 0

    def simulation(self, task: int) -> Simulation:
        """Return the simulation of a local round of ``task``."""
        mask = self.stream.train_task(task).mask
        columns = None if mask is None else torch.tensor(mask, device=self.device)
        model = self.model
        return Simulation(model.module, model.spec, self.trained, self.training, columns, self.variant)

    def plan(self, update: Update, view: ServerView) -> tuple[Tensor, ...]:
        """Return the rows of each step."""
        generator = view.rng(f"inversion batches {update.client}")
        plan = batch_plan(self.rows(update), update.num_examples, self.training, generator)
        return tuple(rows.to(self.device) for rows in plan)

    def start(self, update: Update, view: ServerView, spread: tuple[float, float]) -> tuple[Tensor, Tensor]:
        """Return normal inputs (N, ...) and target logits (N, C) of these standard deviations."""
        generator = view.rng(f"inversion {update.client}")
        mask, rows = self.stream.train_task(update.task).mask, self.rows(update)
        columns = sum(self.stream.heads) if mask is None else len(mask)
        x = spread[0] * torch.randn((rows, *self.input_shape), generator=generator)
        return x.to(self.device), (spread[1] * torch.randn((rows, columns), generator=generator)).to(self.device)
