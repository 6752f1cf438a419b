"""Three real devices, one killed and restarted, one slow, one that leaves; beside it the same run in simulation.

    PYTHONPATH=. python benchmarks/deployment/run.py

Everything runs on this machine, over loopback, with TLS and a key for each device; at its end ``results.json`` is
written beside this file. ``benchmarks/deployment.md`` reads it.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from fedcl.assembly import load_dataset, split_dataset
from fedcl.config.compose import compose
from fedcl.deploy.init import init
from fedcl.deploy.layout import Fleet
from fedcl.deploy.processes import Processes, free_port
from fedcl.deploy.submit import submit
from fedcl.results import load
from fedcl.runs.experiment import run
from fedcl.runs.forget import Asked, forget
from fedcl.runs.verify import verify
from tests.deploy.link import Link

HERE = Path(__file__).resolve().parent
KILLED, SLOW, LEAVES = "0", "1", "2"
ROUNDS = 5  # a task, of which there are two
CHUNK_SECONDS = 0.6  # by which the slow link holds back each chunk of bytes, in each direction
BACK_AFTER = 5.0  # seconds after which a SuperNode that has ended is started again: our units' RestartSec
GIVEN = [
    *("num_clients=3", "scenario.num_tasks=2", f"rounds_per_task={ROUNDS}", "learner=er", "strategy/projection=none"),
    *(
        "strategy/staleness=fedasync",
        "client.epochs=3",
        "client.optimizer.lr=0.1",
        "figures=false",
        "compare_with=null",
    ),
]
LATE = ["async.buffer=2"]
# what the other devices were to the simulation: seconds a visit, and the slow one's
PACE = {KILLED: 8.0, SLOW: 20.0, LEAVES: 8.0}
AWAY = (20.0, 85.0)  # when the killed device is not there, on the simulation's clock


def write_data(folder: Path) -> Path:
    """Write the built-in digits as an npz file, as floats, so that devices need no scikit-learn."""
    dataset = load_dataset(compose(["data=digits"]))
    halves: dict[str, Any] = {
        f"{name}_{half}": array
        for half, part in (("train", dataset.train), ("test", dataset.test))
        for name, array in (("x", part.x[:, 0].astype(np.float32) * np.float32(dataset.scale)), ("y", part.y))
    }
    np.savez(folder / "digits.npz", **halves)
    return folder / "digits.npz"


def deal(fleet: Fleet, data: Path, alpha: list[str]) -> None:
    """Give each device a file of its own, with what the simulation's client of its name holds."""
    cfg = compose(["data=npz", f"data.root={data}", *alpha, "num_clients=3"])
    dataset = load_dataset(cfg)
    partition = split_dataset(cfg, dataset)
    for name, train, test in zip(fleet.devices, partition.train, partition.test, strict=True):
        own: dict[str, Any] = {"x_train": dataset.train.x[train][:, 0], "y_train": dataset.train.y[train]}
        own |= {
            "x_test": dataset.test.x[test][:, 0],
            "y_test": dataset.test.y[test],
            "classes": np.array(dataset.classes),
        }
        np.savez(fleet.device(name) / "own.npz", **own)
        spec = fleet.device(name) / "client.yaml"
        spec.write_text(f'client: "{name}"\ndata: [data=npz, "data.root={fleet.device(name) / "own.npz"}"]\n')


def wait_for(condition: Callable[[], bool], seconds: float = 900) -> None:
    """Wait until something is so."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError("the run does not get there")
        time.sleep(0.2)


def rounds_done(folder: Path) -> int:
    """Return how many rounds have been played."""
    found = (folder / "checkpoints").glob("round_*")
    return max((int(path.name.removeprefix("round_")) + 1 for path in found), default=0)


def on_devices(work: Path, data: Path, alpha: list[str]) -> Path:
    """Play the run on real devices, and trouble it."""
    fleet = init(work / "fleet", devices=3, address="127.0.0.1", port=free_port())
    deal(fleet, data, alpha)
    link = Link(fleet.port)
    script = fleet.device(SLOW) / "start.sh"
    script.write_text(script.read_text().replace(fleet.where, f"127.0.0.1:{link.port}"))
    folder = work / "devices"

    def trouble() -> None:
        wait_for(lambda: rounds_done(folder) >= 1)
        link.delay = CHUNK_SECONDS
        wait_for(lambda: rounds_done(folder) >= 2)
        os.killpg(processes.running[f"device-{KILLED}"].pid, signal.SIGKILL)
        wait_for(lambda: rounds_done(folder) >= ROUNDS + 1)
        forget(folder, Asked(clients=(LEAVES,), id="leaver"))

    def restart() -> None:
        while not over.is_set():
            for name in fleet.devices:
                process = processes.running.get(f"device-{name}")
                if process is not None and process.poll() is not None and not over.is_set():
                    time.sleep(BACK_AFTER)
                    processes.stop(f"device-{name}", hard=True)  # and what it has left behind
                    processes.start_device(name)
                    starts.append(name)
            over.wait(0.5)

    over, starts = threading.Event(), list[str]()

    with Processes(fleet) as processes:
        processes.start_server()
        for name in fleet.devices:
            processes.start_device(name)
        threads = [threading.Thread(target=what, daemon=True) for what in (trouble, restart)]
        for thread in threads:
            thread.start()
        given = [*GIVEN, *LATE, "data=npz", f"data.root={data}", "data/partition=local", "unlearner=ssd"]
        submit(fleet, [*given, f"run_dir={folder}"], quiet=False)
        over.set()
        for thread in threads:
            thread.join(30)
    link.close()
    (folder / "starts.json").write_text(json.dumps(starts))
    return folder


def simulated(work: Path, data: Path, alpha: list[str], *, troubled: bool) -> Path:
    """Play the same run inline: untroubled and synchronous, or with the same trouble on a virtual clock."""
    folder = work / ("troubled" if troubled else "calm")
    given = [*GIVEN, "backend=inline", "data=npz", f"data.root={data}", *alpha, f"run_dir={folder}"]
    if troubled:
        trace, (gone, back), period = work / "devices.csv", AWAY, 100000.0
        rows = [f"{client},{seconds},,," for client, seconds in PACE.items()]
        rows[0] = f"{KILLED},{PACE[KILLED]},{period},{1 - (back - gone) / period},{period - back}"
        trace.write_text("\n".join(["client,latency,period,duty,phase", *rows, ""]))
        asked = f"{{id: leaver, scope: client, clients: ['{LEAVES}'], at: {{round: {ROUNDS + 2}}}}}"
        given += [*LATE, "devices=trace", f"devices.path={trace}", "unlearner=ssd", f"unlearning.requests=[{asked}]"]
        given += ["unlearning.reference=false"]
    return run(compose(given), given, [], quiet=True)


def told(folder: Path) -> dict[str, Any]:
    """Return what a run's folder says."""
    played = load(folder)
    summary, events, metrics = played.summary, played.events, played.metrics
    failed = [row for row in events.to_dict("records") if row["kind"] == "client_failed"]
    trained = metrics[metrics["phase"] == "train"]
    certificates = sorted((folder / "certificates").glob("0*.json"))
    found: dict[str, Any] = {
        "accuracy": summary["accuracy/average"],
        "forgetting": summary["forgetting/chaudhry"],
        "rounds": summary["rounds"],
        "replies": trained.groupby("client")["round"].nunique().to_dict(),
        "lost": dict(Counter(row["client"] for row in failed)),
        "lost_why": sorted({row["reason"] for row in failed}),
        "dropped": int((events["kind"] == "update_dropped").sum()),
        "age_mean": summary.get("staleness/mean", 0.0),
        "age_max": summary.get("staleness/max", 0.0),
        "seconds": summary["wall_time"],
        "virtual_seconds": summary.get("virtual_time"),
        "bytes_up": summary["bytes/up"],
        "bytes_down": summary["bytes/down"],
    }
    if (folder / "starts.json").is_file():
        found["started_again"] = json.loads((folder / "starts.json").read_text())
    if certificates:
        content = json.loads(certificates[0].read_text())
        found["certificate"] = {
            "round": content["server_round"],
            "guarantee": content["guarantee"].partition(":")[0],
            "residuals": [f"{row['part']}: {row['outcome']}" for row in content["erasure"]],
            "valid": verify(folder),
        }
    return found


def main() -> None:
    """Run all three, and write ``results.json``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, help="keep the runs' folders there")
    keep = parser.parse_args().work
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    alpha = ["data.partition.alpha=1.0"]
    with tempfile.TemporaryDirectory() as name:
        work = keep or Path(name)
        work.mkdir(parents=True, exist_ok=True)
        data = write_data(work)
        results = {
            "simulation": told(simulated(work, data, alpha, troubled=False)),
            "simulation_troubled": told(simulated(work, data, alpha, troubled=True)),
        }
        started = time.perf_counter()
        results["devices"] = told(on_devices(work, data, alpha))
        results["devices"]["seconds_with_start"] = time.perf_counter() - started
        results["load"] = {"cores": os.cpu_count(), "average": os.getloadavg()[1]}
    (HERE / "results.json").write_text(json.dumps(results, indent=2, default=float) + "\n")
    print(json.dumps(results, indent=2, default=float))


if __name__ == "__main__":
    main()
