"""Several ``fedcl forget`` on one run at the same time, each a process of its own."""

from __future__ import annotations

import fcntl
import subprocess
import sys
from pathlib import Path

import pytest

from fedcl.results import load, schema
from fedcl.results.checkpoint import Checkpoints
from fedcl.runs.verify import verify
from fedcl.unlearning.sources import exclusive

HOLD = "import sys, time; from pathlib import Path; from fedcl.unlearning.sources import exclusive\n"
HOLD += "with exclusive(Path(sys.argv[1])): print('held', flush=True); time.sleep(600)"


def started(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, bufsize=1
    )


def asking(folder: Path, client: str) -> subprocess.Popen[str]:
    more = ["--id", f"c{client}", "--unlearner", "continue_without", "--quiet"]
    return started("-m", "fedcl", "forget", str(folder), "--client", client, *more)


def line_of(stream: object) -> str:
    assert hasattr(stream, "readline")
    return str(stream.readline())


def test_who_holds_the_run_holds_it_exclusive(finished: Path) -> None:
    before = (finished / schema.CONFIG).stat().st_mtime_ns
    with (finished / schema.CONFIG).open("rb") as other:
        with exclusive(finished), pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    assert (finished / schema.CONFIG).stat().st_mtime_ns == before


@pytest.mark.slow
def test_two_at_once_are_both_served_one_after_the_other(finished: Path) -> None:
    both = [asking(finished, client) for client in ("0", "1")]
    ended = [process.communicate(timeout=300) for process in both]
    assert [process.returncode for process in both] == [0, 0], ended
    served = sorted(path.name for path in (finished / "certificates").glob("000[23]-*.json"))
    assert served in (["0002-c0.json", "0003-c1.json"], ["0002-c1.json", "0003-c0.json"])
    assert load(finished).status == "done"
    assert {"0", "1", "3"}.isdisjoint(Checkpoints(finished).load()[0]["server"]["committed"])
    assert verify(finished, retrain=False)


@pytest.mark.slow
def test_who_waits_says_so_and_a_killed_process_leaves_no_lock(finished: Path) -> None:
    holder = started("-c", HOLD, str(finished))
    try:
        assert line_of(holder.stdout) == "held\n"
        waiting = asking(finished, "1")
        assert line_of(waiting.stderr) == f"{finished}: another request is being processed, waiting for it\n"
        assert waiting.poll() is None
        assert not (finished / "requests.jsonl").exists()  # nothing is handed in before it is its turn
    finally:
        holder.kill()
        holder.communicate()
    out, error = waiting.communicate(timeout=300)
    assert waiting.returncode == 0, error
    assert Path(out.strip()).name == "0002-c1.json"
    assert verify(finished, retrain=False)
