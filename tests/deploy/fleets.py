"""Fleets on loopback whose processes end with the test, whatever started them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from fedcl.deploy.init import init
from fedcl.deploy.layout import Fleet
from fedcl.deploy.processes import Processes, free_ports


def new_fleet(folder: Path, devices: int, **options: bool) -> Fleet:
    port, control_port = free_ports(2)
    where = {"port": port, "control_port": control_port}
    return init(folder, devices=devices, address="127.0.0.1", **where, **options)


@contextmanager
def ended(folder: Path, end_processes: Callable[[str], None]) -> Iterator[Callable[[Fleet], Processes]]:
    if not Path("/proc").is_dir():
        pytest.skip("finds the processes it started through /proc")
    tag = f"FEDCL_TEST_TAG={folder}"
    os.environ["FEDCL_TEST_TAG"] = str(folder)
    opened: list[Processes] = []

    def open_(fleet: Fleet) -> Processes:
        opened.append(Processes(fleet))
        return opened[-1]

    try:
        yield open_
        for processes in opened:
            processes.__exit__(None, None, None)
    finally:
        del os.environ["FEDCL_TEST_TAG"]
        end_processes(tag)
