"""docs/deploy.md, followed to the letter, but for the address, the paths of the example's data and its port."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from fedcl.deploy.layout import Fleet
from fedcl.deploy.processes import Processes, free_ports
from fedcl.results import load

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "deploy.md").read_text(encoding="utf-8")
pytestmark = [pytest.mark.deployment, pytest.mark.slow, pytest.mark.timeout(900)]


def command(start: str) -> list[str]:
    """Return the one indented command of the page that begins like this."""
    found = [line.strip() for line in PAGE.splitlines() if line.startswith(f"    {start}")]
    assert len(found) == 1, f"docs/deploy.md: {start}: {found}"
    return shlex.split(found[0])


def test_a_reader_who_follows_the_page_gets_a_finished_run(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    up: Callable[[Fleet], Processes],
    split: Callable[[Fleet], None],
    samples: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    here = {"192.168.1.10": "127.0.0.1", "/srv/test.npz": str(samples)}

    def follow(start: str, *more: str) -> subprocess.CompletedProcess[str]:
        words = command(start)
        for theirs, ours in here.items():
            words = [word.replace(theirs, ours) for word in words]
        given = [sys.executable, "-m", *words, *more]
        return subprocess.run(given, capture_output=True, text=True, timeout=560, check=False)

    port, control_port = free_ports(2)
    made = follow("fedcl deploy init", "--port", str(port), "--control-port", str(control_port))
    assert made.returncode == 0, made.stderr
    fleet = Fleet.load(tmp_path / "fleet")
    written = re.findall(r"\| `fleet/([\w/]+)`", PAGE)
    assert written == ["ca", "server", "devices/0"]
    assert all((fleet.folder / name).is_dir() for name in written)
    split(fleet)
    example = [line.strip() for line in PAGE.splitlines() if line.startswith(("    client:", "    data:"))]
    assert [line.split(":")[0] for line in example] == ["client", "data"]
    checked = follow("fedcl deploy check")
    assert checked.returncode == 0, checked.stdout
    assert "WRONG" not in checked.stdout
    processes = up(fleet)
    assert command("fleet/server/start.sh") == ["fleet/server/start.sh"]
    assert command("fleet/devices/0/start.sh") == ["fleet/devices/0/start.sh"]
    processes.start_server()
    for name in fleet.devices:
        processes.start_device(name)
    assert follow("fedcl deploy register").stdout == "3 devices may join: 0, 1, 2\n"
    short = ["scenario.num_tasks=1", "rounds_per_task=1", "strategy/projection=none", "figures=false"]
    done = follow("fedcl deploy run", *short)
    assert done.returncode == 0, done.stdout + done.stderr
    folder = Path(done.stdout.splitlines()[-1])
    assert folder.parent == fleet.folder / "runs"
    assert load(folder).status == "done"
    again = follow("fedcl deploy resume")
    assert again.returncode == 2
    assert "the run is done" in again.stderr


def test_the_rehearsal_of_the_page_composes() -> None:
    from fedcl.config.compose import compose

    words = command("fedcl deploy local")
    compose([word for word in words if "=" in word])
