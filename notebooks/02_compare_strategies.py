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
# # Compare strategies
#
# Forgetting can be fought at the server or at the clients. FOT (`strategy/projection=fot`) keeps the server's changes
# out of directions that earlier tasks need. Experience replay (`learner=er`) has each client keep a few samples and
# train on them again, which costs it memory and asks that it may keep them. Which of the two is it to be, and do both
# help more than one?
#
# One run answers nothing: another seed may turn it around. So each of the four combinations is run with six seeds.

# %%
import shlex
import tempfile
from itertools import product
from pathlib import Path

from IPython.display import Markdown

from fedcl.cli import main
from fedcl.results import figures, load
from fedcl.results.compare import compare
from fedcl.results.tables import render

# %matplotlib inline

folder = tempfile.TemporaryDirectory(prefix="fedcl-")
runs = Path(folder.name)


def fedcl(command: str) -> None:
    """Do what `fedcl COMMAND` does in a shell."""
    if status := main(shlex.split(command)):
        raise RuntimeError(f"exit status {status}")


# %% [markdown]
# ## Run all of them
#
# In a shell this is one line, which also goes on where it was interrupted, leaves a failed run behind and does the
# rest, and prints the table at the end:
#
# ```bash
# fedcl sweep seed=0,1,2,3,4,5 learner=finetune,er strategy/projection=none,fot num_clients=4 rounds_per_task=5
# ```
#
# Each of its runs is a process of its own. These are so short that starting the processes would take most of the time;
# here they are played one after the other in this one.

# %%
SETTINGS = "backend=inline compare_with=null figures=false num_clients=4 rounds_per_task=5"
SEEDS = range(6)

for learner, projection, seed in product(("finetune", "er"), ("none", "fot"), SEEDS):
    choice = f"learner={learner} strategy/projection={projection} seed={seed}"
    fedcl(f"run {SETTINGS} {choice} run_dir={runs}/{learner}_{projection}_{seed} --quiet")

# %% [markdown]
# ## The table
#
# `fedcl compare FOLDER` finds the runs below a folder; what differs by nothing but the seed becomes a row. `compare` is
# the same as a function.

# %%
comparison = compare([runs], baseline="learner=finetune projection=none", metrics=["accuracy/average"])
Markdown(render(comparison, "markdown"))

# %% [markdown]
# Behind the ± is half the width of a 95 % interval over the seeds. *Difference* is taken seed by seed from the
# baseline: both have met the same data in the same order, so what a seed makes easy or hard falls out of it. Then there
# are two p: of the paired t test, and of a test that assumes nothing about how the differences are distributed. With
# six pairs the latter can go below 0.05, with five it never does, however clear the matter is: worth knowing before one
# plans seeds.
#
# ## The figures
#
# The functions of `fedcl.results.figures` take a run or a list of seeds; then they show means with their intervals.

# %%
by_choice = {
    f"{learner}, {projection}": [load(runs / f"{learner}_{projection}_{seed}") for seed in SEEDS]
    for learner, projection in product(("finetune", "er"), ("none", "fot"))
}
figures.accuracy_by_task(by_choice["finetune, none"])

# %%
figures.accuracy_by_task(by_choice["finetune, fot"])

# %%
figures.accuracy_by_task(by_choice["er, none"])

# %% [markdown]
# Without a remedy the curves of early tasks go down as soon as others are trained, and their bands widen: how much is
# lost is a matter of luck. FOT and replay both hold them.
#
# ## What it costs
#
# Accuracy is half of an answer. What do messages, computing and memory come to?

# %%
for name, seeds in by_choice.items():
    up, flops, kept = (seeds[0].summary.get(key, 0.0) for key in ("bytes/up", "cost/flops", "cost/state_bytes"))
    print(f"{name:<15} {up / 1e6:6.2f} MB up {flops / 1e6:8.1f} MFLOP {kept / 1e3:8.2f} kB kept by a client")

# %%
figures.accuracy_against_cost(by_choice["er, fot"])

# %% [markdown]
# FOT pays with messages, in which clients tell the server what their layers see; replay pays with training on more
# samples and with a buffer at every client. Where devices may not keep samples, or their owners ask for them to be
# forgotten, that decides more than a point of accuracy.
#
# ## What is not compared
#
# Runs that met other data are not put side by side by accident: the first difference is named, and the answer is no.

# %%
fedcl(f"run {SETTINGS} data.partition.alpha=5 seed=0 run_dir={runs}/elsewhere --quiet")
main(["compare", str(runs / "er_none_0"), str(runs / "elsewhere")])

# %% [markdown]
# Next: [a method of your own](03_write_your_own.ipynb).
