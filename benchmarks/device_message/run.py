"""What a message costs a device before it trains: CPU seconds of the fresh process that Flower starts for each.

python benchmarks/device_message/run.py [--messages 3]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

_MESSAGE = """
import json, sys, time
from pathlib import Path
laps, last = {}, time.process_time()
def lap(name):
    global last
    now = time.process_time()
    laps[name], last = round(now - last, 3), now
import torch
lap("torch")
import flwr.clientapp
lap("flwr")
import fedcl.client_app as app
from fedcl.client.device import Agreement, read_spec
from fedcl.client.device_state import DeviceStateStore
lap("fedcl")
spec = read_spec(Path(sys.argv[1]) / "client.yaml")
store = DeviceStateStore(spec.state, "benchmark", "0")
sent = "data/partition=local scenario.num_tasks=2 learner=er strategy/projection=none num_clients=3"
cfg = app._device_config(sent, spec, store)
lap("configuration")
app._device_runtime(cfg, spec, Agreement(tuple(str(k) for k in range(10)), (16,), True))
lap("data and model")
print(json.dumps({**laps, "total": round(sum(laps.values()), 3)}))
"""


def main() -> None:
    """Print one line of JSON a message; the first is the run's first on this device."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--messages", type=int, default=3)
    count = parser.parse_args().messages
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as name:
        halves = {}
        for half, size in (("train", 300), ("test", 100)):
            halves |= {f"x_{half}": rng.normal(size=(size, 16)).astype(np.float32), f"y_{half}": np.arange(size) % 10}
        np.savez(Path(name) / "samples.npz", **halves)
        spec = f'client: "0"\ndata: [data=npz, "data.root={name}/samples.npz"]\n'
        (Path(name) / "client.yaml").write_text(spec)
        for _ in range(count):
            env = {**os.environ, "OMP_NUM_THREADS": "1"}
            done = subprocess.run([sys.executable, "-c", _MESSAGE, name], env=env, capture_output=True, check=True)
            print(json.dumps(json.loads(done.stdout)))


if __name__ == "__main__":
    main()
