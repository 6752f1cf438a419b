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
# # Unlearning and certificates
#
# Somebody asks that their data be forgotten. Deleting them is easy; what the model has learned from them is still in
# it. The exact remedy is to retrain without them, which takes as long as the training did. Others are faster.
# What do they leave behind, how does one measure it, and what can be shown to whoever asked?

# %%
import json
import shlex
import shutil
import tempfile
from pathlib import Path

import pandas as pd

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
# ## A request, three ways to process it
#
# Six clients learn the ten digits. After ten rounds the class 3 is to be forgotten by all; eight rounds without it
# follow. For experiments a request is planned in the settings:
#
# - `continue_without` leaves the class out from then on and does nothing else;
# - `neggrad_plus` has its owners train up the loss on the class while they train down that on the rest;
# - `retrain` trains again, with the same seed and rounds, as if nobody had ever had the class.

# %%
SETTINGS = (
    "backend=inline compare_with=null figures=false --quiet "
    "num_clients=6 scenario=joint strategy/projection=none rounds_per_task=18"
)
REQUEST = '"unlearning.requests=[{id: threes, scope: class, classes: [3], at: {round: 10}}]"'

for unlearner in ("continue_without", "neggrad_plus", "retrain"):
    fedcl(f"run {SETTINGS} {REQUEST} unlearner={unlearner} run_dir={runs}/{unlearner}")

# %% [markdown]
# ## Next to retraining
#
# In a simulation the retrained model is there for comparison, whatever the unlearner. It is the
# measure of everything: it has never seen a three, and still a test of it gives some number. On either side of that
# number there is a trace of the data, so each measurement is shown as the difference to it. Hollow is the model before
# the request.

# %%
figures.unlearning_gaps(load(runs / "continue_without"))

# %%
figures.unlearning_gaps(load(runs / "neggrad_plus"))

# %% [markdown]
# Going on without the class leaves every number where it was, right after the request; the two marks coincide. NegGrad+
# brings the accuracy on the class, the two shaded rows, to that of retraining; what this costs the other classes is in
# the rows below. Look at the last one, too: a linear probe asks whether the features inside still tell threes apart.
#
# ## Is it gone?
#
# Training goes on, and the curve follows the accuracy on threes after the request.

# %%
figures.revival_curve(load(runs / "continue_without"))

# %%
figures.revival_curve(load(runs / "neggrad_plus"))

# %% [markdown]
# Even where nothing was done the accuracy falls, since nobody trains threes any more: that a model does not answer
# "three" says little. How soon could it be taught again? The certificate has a number for it, the steps of training on
# a few threes after which they are recognised again.

# %%
for unlearner in ("continue_without", "neggrad_plus", "retrain"):
    (file,) = (runs / unlearner / "certificates").glob("*.json")
    measured = json.loads(file.read_text())["measurements"]
    steps = measured["relearn_steps"], measured["reference/relearn_steps"]
    print(f"{unlearner:<17} knows threes again after {steps[0]:2.0f} steps; retrained, after {steps[1]:2.0f}")

# %% [markdown]
# A model that has only been talked out of its answers is back sooner than one that never had the class. That is what
# `approximate` means on a certificate, and why every number is to be read next to retraining's.
#
# ## A request to a run that is over
#
# Out of the laboratory, requests are not planned. `fedcl forget` hands one in: to a run that goes on, for before its
# next round, or to one that is over, where it is processed at once. Client 2 leaves the retrained run, which thereby
# forgets a second time.

# %%
fedcl(f"forget {runs}/retrain --client 2 --id ticket-4711")

# %% [markdown]
# ## The certificate
#
# Each request gets one: what was asked, what was done, what is retained, what it cost, and what is promised.

# %%
certificates = sorted((runs / "retrain" / "certificates").glob("*.json"))
ticket = json.loads(certificates[-1].read_text())
for key in ("guarantee", "processed_with", "server_round", "time", "previous", "sha256"):
    print(f"{key:<13} {ticket[key]}")

# %%
pd.DataFrame(ticket["erasure"])

# %% [markdown]
# The table lists everything that remembers something: what was erased, what was computed again, and what keeps nothing
# about clients. Should anything remain, it says so, and why.
#
# `fedcl verify` checks the certificates. Where the promise is *exact* it does not believe it: it trains again without
# what was to be forgotten, and the models must be those of the certificate, bit for bit.

# %%
fedcl(f"verify {runs}/retrain")

# %%
fedcl(f"verify {runs}/neggrad_plus")

# %% [markdown]
# NegGrad+ promises nothing, and its certificate says `approximate`; its measurements are evidence.
#
# Each certificate carries the hash of the one before it. Change one later, here by a single word, and it shows.

# %%
shutil.copytree(runs / "neggrad_plus", runs / "changed")
changed = next((runs / "changed" / "certificates").glob("0001-*.json"))
changed.write_text(changed.read_text().replace("approximate", "exact", 1))
main(["verify", str(runs / "changed")])

# %% [markdown]
# Exit status 1: one is not valid. A hash is no signature, though. Whoever can write to the folder can write all of it
# again; so send the last `sha256` to somebody else when it matters. What is erased and what cannot be is in
# `docs/unlearning.md`.
#
# Next: [from simulation to devices](06_from_simulation_to_devices.ipynb).
