# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Write your own learner and strategy
#
# A method of your own is a class and a YAML. Both lie in a folder of yours; fedcl is not changed. Here we write a
# learner that keeps a few samples of each task and trains on them again, and a strategy that lets no client move the
# model too far. Then both run together, next to what fedcl brings.
#
# When you edit these files later, restart the kernel: Python does not read a module twice. In a shell there is nothing
# to restart.

# %%
import shlex
import tempfile
from pathlib import Path

from fedcl.cli import main
from fedcl.results import figures, load

# %matplotlib inline

folder = tempfile.TemporaryDirectory(prefix="fedcl-")
my, runs = Path(folder.name) / "my", Path(folder.name) / "runs"
for group in ("learner", "strategy/collaboration"):
    (my / group).mkdir(parents=True)


def fedcl(command: str) -> None:
    """Do what `fedcl COMMAND` does in a shell."""
    if status := main(shlex.split(command)):
        raise RuntimeError(f"exit status {status}")


def write(name: str, text: str) -> None:
    """Write a file below `my`."""
    (my / name).write_text(text)


# %% [markdown]
# ## A learner
#
# A learner is a set of plugins around one training loop. A plugin overrides the hooks it needs; `docs/own_learner.md`
# lists them. This one needs four:
#
# - `before_step` gets the batch of a step and may return another: with samples of earlier tasks joined to it;
# - `after_task` is called when a task has ended, and chooses what to keep;
# - `state` and `load` carry what must survive. A client is built afresh for every message, perhaps in another process
#   or on a device, so what is not in `state` is lost.
#
# Random numbers come from `ctx.rng` alone. Then a run is the same every time.

# %%
write(
    "keepsakes.py",
    '''\
"""Keep a few samples of each task, and train on them along with every batch."""

import torch

from fedcl.contracts.learner import Batch, Phase, Plugin


class Keepsakes(Plugin):
    phase = Phase.DATA

    def __init__(self, *, per_task):
        self.per_task = per_task
        self.x = self.y = None

    def before_step(self, ctx, batch):
        if self.x is None:
            return batch
        fresh = len(batch.y) if batch.fresh is None else batch.fresh
        chosen = torch.randint(len(self.y), (fresh,), generator=ctx.rng("keepsakes"))
        x, y = torch.cat([batch.x, self.x[chosen]]), torch.cat([batch.y, self.y[chosen]])
        return Batch(x, y, batch.mask, fresh)

    def after_task(self, ctx):
        kept = torch.randperm(len(ctx.data), generator=ctx.rng("choose"))[: self.per_task]
        x, y = ctx.data.x[kept], ctx.data.y[kept]
        self.x = x if self.x is None else torch.cat([self.x, x])
        self.y = y if self.y is None else torch.cat([self.y, y])

    def state(self):
        return {} if self.x is None else {"x": self.x, "y": self.y}

    def load(self, state):
        self.x, self.y = state.get("x"), state.get("y")
''',
)

# %% [markdown]
# The YAML names the class and its parameters, and says what a value may be. Its first line is what `fedcl list` shows.

# %%
write(
    "learner/keepsakes.yaml",
    """\
# Trains on a few kept samples of each earlier task.
keepsakes:
  _target_: keepsakes.Keepsakes
  per_task: 10
  _allowed_:
    per_task: int >= 1
""",
)

# %% [markdown]
# ## A strategy
#
# The server's side is a pipeline of four parts: staleness, collaboration, optimizer, projection. Collaboration makes
# one change of the model out of many clients' changes. This one shortens every change that is longer than `max_norm`,
# so that no client, mistaken or malicious, moves the model far in one round. `term` says what one update adds to the
# sum, and with what weight; the core sums up in a fixed order and divides.

# %%
write(
    "clipped.py",
    '''\
"""The weighted mean of the clients' changes, none of them longer than a bound."""

from fedcl.contracts.strategy import Collaboration


class Clipped(Collaboration):
    def __init__(self, *, max_norm):
        self.max_norm = max_norm

    def term(self, update):
        scale = min(1.0, self.max_norm / max(update.delta.norm().item(), 1e-12))
        return scale * update.delta, update.weight
''',
)

# %%
write(
    "strategy/collaboration/clipped.yaml",
    """\
# The mean of changes, each clipped to an L2 norm.
server:
  _target_: clipped.Clipped
  max_norm: 1.0
  _allowed_:
    max_norm: number > 0
""",
)

# %% [markdown]
# ## Run them
#
# `--config-dir` names the folder. From here on both are choices like any other; values are checked, they compose with
# fedcl's own methods, and a run with them can be swept, resumed, compared and deployed.
#
# The stream is class-incremental: a prediction chooses among all classes seen so far and nobody says which task it is,
# which is hard for a model that cannot see earlier classes again.

# %%
SETTINGS = (
    f"--config-dir {my} --quiet backend=inline compare_with=null figures=false num_clients=5 rounds_per_task=6 "
    "scenario=class_incremental strategy/projection=none"
)
choices = {
    "plain": "",
    "keepsakes": "learner=keepsakes",
    "clipped": "strategy/collaboration=clipped",
    "both": "learner=keepsakes strategy/collaboration=clipped strategy.collaboration.server.max_norm=0.5",
}
for name, choice in choices.items():
    fedcl(f"run {SETTINGS} {choice} run_dir={runs}/{name}")

# %%
for name in choices:
    summary = load(runs / name).summary
    print(f"{name:<10} accuracy {summary['accuracy/average']:6.1%}  forgotten {summary['forgetting/chaudhry']:6.1%}")

# %%
figures.accuracy_matrix(load(runs / "plain"))

# %%
figures.accuracy_matrix(load(runs / "keepsakes"))

# %% [markdown]
# Without kept samples only the last task's column is left: every prediction is one of the newest classes. With ten
# samples a task and client much of the earlier ones stays. Clipping is no remedy for forgetting, and was not meant as
# one; it bounds what a single client can do.
#
# ## What fedcl checks for you
#
# A value that `_allowed_` does not admit never reaches the class:

# %%
main(["run", "--config-dir", str(my), "learner=keepsakes", "learner.keepsakes.per_task=0"])

# %% [markdown]
# Two things to do before you trust a method of yours: write down what it does when samples are to be forgotten
# (`forget`; without it a plugin with state begins again, which is safe), and run it over several seeds next to a
# built-in that is like it, here `learner=er`, as in [the notebook before](02_compare_strategies.ipynb).
#
# Next: [devices that are slow](04_staleness_and_devices.ipynb).
