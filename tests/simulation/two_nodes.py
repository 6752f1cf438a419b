"""A run on a Ray cluster of two nodes on this machine, one of which is lost on the way: a program for test_cluster."""

from __future__ import annotations

import json
import sys
import threading
import time
from pathlib import Path

import ray
from ray.cluster_utils import Cluster

from fedcl.config.compose import compose
from fedcl.runs.experiment import run
from fedcl.simulation.compat import quiet_environment

FAST = {
    "health_check_initial_delay_ms": 500,
    "health_check_period_ms": 500,
    "health_check_timeout_ms": 500,
    "health_check_failure_threshold": 2,
}


def main(health: str, marks: Path, config_dir: Path, overrides: list[str]) -> None:
    quiet_environment()
    sys.path.insert(0, str(config_dir))  # where the learner's module lies
    head = {"num_cpus": 1, "include_dashboard": False, **({"_system_config": FAST} if health == "fast" else {})}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    doomed = cluster.add_node(num_cpus=1)

    def kill() -> None:
        while not (marks / "now").exists():
            time.sleep(0.01)
        cluster.remove_node(doomed, allow_graceful=False)
        (marks / "killed").touch()

    threading.Thread(target=kill, daemon=True).start()
    settings = [*overrides, f"backend.address={cluster.address}"]
    run(compose(settings, [config_dir]), settings, [config_dir], quiet=True)
    left = ray.is_initialized()
    ray.init(address=cluster.address, logging_level="error", log_to_driver=False)
    while (alive := sum(node["Alive"] for node in ray.nodes())) > 1:  # Ray may take a minute to notice
        time.sleep(0.1)
    print(json.dumps({"still_connected": left, "nodes_after": alive}))
    ray.shutdown()
    cluster.shutdown()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:])
