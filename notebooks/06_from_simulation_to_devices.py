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
# # From simulation to devices
#
# A simulation has answered which learner and which strategy to take. Now three devices are to train with them, on data
# that never leave them. The code is the same, and so are the settings; what comes on top is keys, certificates and a
# folder for each device. This notebook makes them, says what is on each device, and rehearses the run in simulation.
# What starts servers is shown and not run.

# %%
import re
import shlex
import socket
import tempfile
from pathlib import Path

import numpy as np
from sklearn.datasets import load_digits

from fedcl.cli import main
from fedcl.results import figures, load

# %matplotlib inline

folder = tempfile.TemporaryDirectory(prefix="fedcl-")
here = Path(folder.name)


def fedcl(command: str) -> None:
    """Do what `fedcl COMMAND` does in a shell."""
    if status := main(shlex.split(command)):
        raise RuntimeError(f"exit status {status}")


# %% [markdown]
# ## A fleet's folder
#
# `--address` is where devices reach the server. Everything is on this machine here, on a port that is free just now;
# leave out `--port` for 8443.

# %%
with socket.socket() as probe:
    probe.bind(("", 0))
    port = probe.getsockname()[1]
fedcl(f"deploy init {here}/fleet --devices 3 --address 127.0.0.1 --port {port}")

# %%
for file in sorted((here / "fleet").rglob("*")):
    if file.is_file():
        print(file.relative_to(here))

# %% [markdown]
# `fleet/ca` signs the server's certificate; keep it off the network. `fleet/server` stays on the server's machine, and
# each folder of `fleet/devices` is copied to its device, where fedcl is installed without its extras.
#
# ## What a device has
#
# A device's owner says in `client.yaml` where its data are, in the words of `fedcl run`. The server never names a path
# on a device. Here the digits are dealt out to three files, and the server gets one of its own to
# test on.

# %%
digits = load_digits()
classes = np.array([str(label) for label in digits.target_names])
order = np.random.default_rng(0).permutation(len(digits.target))
for name, part in zip(("server", "0", "1", "2"), np.array_split(order, 4), strict=True):
    train, test = np.array_split(part, [3 * len(part) // 4])
    arrays = {
        "x_train": digits.images[train].astype(np.float32) / 16,
        "y_train": digits.target[train],
        "x_test": digits.images[test].astype(np.float32) / 16,
        "y_test": digits.target[test],
    }
    np.savez(here / f"{name}.npz", classes=classes, **arrays)

for device in "012":
    file = here / "fleet" / "devices" / device / "client.yaml"
    data = f"data: [data=npz, data.root={here}/{device}.npz]"
    file.write_text(re.sub("^data: null.*$", data, file.read_text(), flags=re.MULTILINE))

print(file.read_text())

# %% [markdown]
# `check` says what is wrong before anything is started: versions, certificates, keys, the port, each device's data. On
# a device it takes the device's own folder.

# %%
fedcl(f"deploy check {here}/fleet")

# %% [markdown]
# A mistake is one line, and exit status 1:

# %%
file.write_text(file.read_text().replace("2.npz", "3.npz"))
try:
    fedcl(f"deploy check {here}/fleet")
except RuntimeError as error:
    print(error)
file.write_text(file.read_text().replace("3.npz", "2.npz"))

# %% [markdown]
# ## Rehearse in simulation
#
# The settings that the devices will get, on this machine, in seconds. Their data are not here, so the server's stand in
# for them, dealt out to three simulated clients. On devices the partition is `local`: everyone has what they have.

# %%
SETTINGS = "learner=er strategy/projection=none scenario.num_tasks=2 rounds_per_task=10 data=npz"
fedcl(
    f"run {SETTINGS} data.root={here}/server.npz data/partition=iid num_clients=3 "
    f"backend=inline compare_with=null figures=false run_dir={here}/rehearsal --quiet"
)

# %%
figures.accuracy_by_task(load(here / "rehearsal"))

# %% [markdown]
# Both tasks are learned, and the buffer of `er` keeps the first from falling while the second is trained. If it did not
# work here, it would not on devices.
#
# ## Rehearse with real processes
#
# One command brings up a server and three devices on this machine, with TLS and keys, does a run, and takes them down
# again. It takes a minute or two, since Flower starts a process for every message:
#
# ```bash
# fedcl deploy local -n 3 rounds_per_task=1 scenario.num_tasks=2 learner=er strategy/projection=none
# ```
#
# ## Go
#
# On the server's machine, and on each device:
#
# ```bash
# fleet/server/start.sh                  # or its systemd unit
# fleet/devices/0/start.sh               # on each device
# fedcl deploy run fleet data=npz data.root=server.npz data/partition=local learner=er \
#     strategy/projection=none scenario.num_tasks=2 rounds_per_task=10
# ```
#
# What comes out is a run's folder like all the others: `load`, `fedcl report` and `fedcl compare` read it. If the
# server's machine dies, `fedcl deploy resume fleet` goes on; `fedcl forget` reaches the devices, too. A synchronous run
# gives the same `metrics.parquet` as a simulation in which each client has the same samples. `docs/deploy.md` has the
# details, and what goes wrong.
