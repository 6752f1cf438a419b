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
# # Quickstart
#
# Ten clients hold handwritten digits. They never show them to anybody; together they train one model. The digits come
# in five tasks, two new classes each, and once a task is over its samples are gone. How much of the earlier tasks does
# the model forget, and what helps?
#
# A command line of fedcl does what it does in a shell; `fedcl("run ...")` below is `fedcl run ...` there. Runs are
# written to a folder that goes away with this notebook: put the name of one of your own in its place to keep them.

# %%
import hashlib
import shlex
import tempfile
from pathlib import Path

from fedcl.cli import main
from fedcl.results import figures, load

# %matplotlib inline

folder = tempfile.TemporaryDirectory(prefix="fedcl-")
runs = Path(folder.name)


def fedcl(command: str) -> None:
    """Do what `fedcl COMMAND` does in a shell."""
    if status := main(shlex.split(command)):
        raise RuntimeError(f"exit status {status}")


# %% [markdown]
# ## Run
#
# Without settings fedcl trains with FOT, which keeps the server from changing what earlier tasks need, and then does
# the same without it, as the *reference*. Three settings are added here: `backend=inline` trains in this process (the
# default starts Ray workers), `figures=false` leaves drawing to us, `run_dir` says where to write.

# %%
fedcl(f"run backend=inline figures=false run_dir={runs}/first --quiet")

# %% [markdown]
# ## Read
#
# A run is a folder. `load` reads it back: one long table of everything that was measured, and the numbers that are
# computed from it.

# %%
run = load(runs / "first")
run.metrics.sample(5, random_state=0)

# %%
for name in ("accuracy/average", "forgetting/chaudhry"):
    print(f"{name:<20} {run.summary[name]:6.1%} with FOT, {run.summary['reference/' + name]:6.1%} without")

# %% [markdown]
# `accuracy/average` is the accuracy over all tasks at the end, `forgetting/chaudhry` how far each task has fallen below
# its best. `docs/metrics.md` defines every number.
#
# The accuracy matrix has it all: a row for each moment at which a task ended, a column for each task.

# %%
run.accuracy_matrix().round(3)

# %%
figures.accuracy_matrix(run)

# %% [markdown]
# The frame marks a task that has just been learned. Going down a column one sees what later tasks do to it: with FOT
# little. What stands above the frame are tasks that the model has not met, so it guesses between two classes.
#
# The reference is a run like any other. Its curves fall where FOT's stay.

# %%
figures.accuracy_by_task(run)

# %%
figures.accuracy_by_task(run.reference)

# %%
figures.forgetting_bars(run)

# %% [markdown]
# ## The same again
#
# A run is a function of its settings and its seed. Here it is once more, without the reference: every number is the
# same, to the bit. So it is with any number of Ray workers, after a crash and `fedcl resume`, and on real devices.

# %%
fedcl(f"run backend=inline figures=false compare_with=null run_dir={runs}/again --quiet")

first, again = ((runs / name / "metrics.parquet").read_bytes() for name in ("first", "again"))
assert hashlib.sha256(first).digest() == hashlib.sha256(again).digest()

# %% [markdown]
# ## Choose
#
# What can be chosen has kinds, and each kind a list. `fedcl("list")` has the kinds.

# %%
fedcl("list strategy/projection")

# %% [markdown]
# A choice is `group=name`, a setting `key=value`. What is wrong is said in one line, with what is allowed, before
# anything is written; in a shell the exit status is 2.

# %%
main(["run", "client.optimizer.lr=fast"])

# %% [markdown]
# ## Show
#
# `fedcl report` writes one HTML file with tables, figures, settings and the command that does the run again. It loads
# nothing from anywhere, so it can be mailed.

# %%
fedcl(f"report {runs}/first")

# %% [markdown]
# Next: [comparing strategies](02_compare_strategies.ipynb), over several seeds and with a test.
