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
# # Staleness and devices
#
# Devices are not alike. In a round that waits for everybody, the slowest decides how long it takes. One that does not
# wait gets updates that started from an old model: they are *stale*. What is gained by not waiting, and what should
# become of late updates?
#
# In a simulation nobody waits in fact. `devices=` gives every client a device with a speed and a bandwidth, on a
# virtual clock; it decides when an update arrives, and the run takes no longer for it.

# %%
import shlex
import tempfile
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
# ## Three ways to close a round
#
# `devices=tiers` has three kinds: two clients in ten are fast, five are ordinary, three are slow and far away. There
# are two tasks of five classes. The three runs use as many updates, or nearly so:
#
# | | a round is over | rounds a task |
# |---|---|---|
# | `wait` | when all ten have answered | 8 |
# | `deadline` | after 0.5 seconds; who is late comes into a later round | 10 |
# | `buffer` | with the fourth answer, whoever gives it | 20 |

# %%
SETTINGS = (
    "backend=inline compare_with=null figures=false --quiet "
    "num_clients=10 scenario.num_tasks=2 strategy/projection=none devices=tiers"
)
rounds = {
    "wait": "rounds_per_task=8",
    "deadline": "rounds_per_task=10 async.deadline=0.5",
    "buffer": "rounds_per_task=20 async.buffer=4",
}
for name, choice in rounds.items():
    fedcl(f"run {SETTINGS} {choice} run_dir={runs}/{name}")

# %%
for name in rounds:
    run = load(runs / name)
    updates = (run.metrics["name"] == "num_examples").sum()
    print(
        f"{name:<9} {updates:4} updates in {run.summary['virtual_time']:5.1f} virtual seconds, "
        f"accuracy {run.summary['accuracy/average']:.1%}, mean age {run.summary['staleness/mean']:.2f}"
    )

# %% [markdown]
# The age of an update is how many versions of the model have passed since it began. When everybody is waited for it is
# 0.
#
# The timeline shows why. Each dot is an update that counts; the line leads back to the moment when its model was the
# newest.

# %%
figures.timeline(load(runs / "wait"))

# %%
figures.timeline(load(runs / "deadline"))

# %%
figures.timeline(load(runs / "buffer"))

# %% [markdown]
# Waiting, all dots stand in columns with wide gaps between them: everybody idles until the slow ones are done. With a
# deadline the slow clients' lines are long, and the others go on meanwhile. With a buffer the quick ones answer again
# and again, and a task is over before a slow client has answered once. A cross is an update that came to nothing: its
# task was over, and then it is dropped unless `async.finished_task=keep`. It is the shortest of the three runs, and the
# model has learned nothing from the slow clients.

# %%
figures.accuracy_by_task(load(runs / "wait"), over="virtual_time")

# %%
figures.accuracy_by_task(load(runs / "deadline"), over="virtual_time")

# %%
figures.staleness_histogram(load(runs / "deadline"))

# %% [markdown]
# ## What becomes of late updates
#
# The strategy's staleness part decides. `none` adds a late change as if it were fresh; `fedbuff` makes it the smaller
# the older it is; `drop` throws it away, and with it whatever only slow clients know. Which is best depends on how old
# updates are and on who is late, so it is a question for several seeds.

# %%
for staleness in ("none", "fedbuff", "drop"):
    for seed in range(4):
        choice = f"{rounds['deadline']} strategy/staleness={staleness} seed={seed}"
        fedcl(f"run {SETTINGS} {choice} run_dir={runs}/late/{staleness}_{seed}")

# %%
comparison = compare([runs / "late"], metrics=["accuracy/average", "accuracy/stale_classes"])
Markdown(render(comparison, "markdown"))

# %% [markdown]
# `accuracy/stale_classes` looks at the classes of those whose updates came late. Read the intervals before the means:
# with four seeds and a small test set they are wide, and only what stands clear of zero in *difference* is a finding.
#
# Further corrections are in `fedcl list strategy/staleness`, up to gradient inversion, which makes up what a late
# client would send today. Devices that come and go, drop out, or follow a trace of your own are in `docs/devices.md`.
#
# Next: [data that must be forgotten](05_unlearning_and_certificates.ipynb).
