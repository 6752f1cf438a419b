"""The jobs of a sweep as processes of their own: a crash costs one job, a signal none."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from fedcl.config.overrides import as_text
from fedcl.results import schema
from fedcl.sweep.index import Entry, Index

_STOPPED = {130: signal.SIGINT, 143: signal.SIGTERM, -signal.SIGINT: signal.SIGINT, -signal.SIGTERM: signal.SIGTERM}
# exit status -> the signal behind it: a run's own, or the bare process's where it came too early for the run
_PATIENCE = 60.0  # seconds to wait for a job that has been asked to stop twice


@dataclass
class Jobs:
    """Plays a sweep's jobs, so many ``at_once``; ``tell`` is called with each when it has ended.

    Jobs inherit the descriptors ``held``, and get the arguments ``more`` when they resume a run.
    """

    index: Index
    at_once: int
    held: tuple[int, ...]
    tell: Callable[[Entry, float], None]
    more: tuple[str, ...] = ()
    _running: dict[subprocess.Popen[bytes], tuple[Entry, float, IO[bytes], int]] = field(default_factory=dict)

    def run(self, entries: Iterable[Entry]) -> None:
        """Run them all. After a signal, each job finishes its round and can be resumed later.

        Raises
        ------
        KeyboardInterrupt, SystemExit
            The signal, when all jobs have ended.
        """
        waiting = deque(entries)
        try:
            while waiting or self._running:
                while waiting and len(self._running) < self.at_once:
                    self._start(waiting.popleft())
                self._gather()
                time.sleep(0.05)
        finally:
            self._stop()

    def _start(self, entry: Entry) -> None:
        run_dir, log = self.index.run_dir(entry), self.index.log(entry)
        log.parent.mkdir(exist_ok=True)
        file = log.open("ab")
        entry.status, entry.error = "running", None
        self.index.write()
        process = subprocess.Popen(
            [sys.executable, "-m", "fedcl", *self._words(entry, run_dir)],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            pass_fds=self.held,
            start_new_session=True,  # Ctrl-C reaches the sweep alone, which tells its jobs once
        )
        self._running[process] = (entry, time.monotonic(), file, file.tell())

    def _words(self, entry: Entry, run_dir: Path) -> list[str]:
        configs = [word for folder in self.index.config_dirs for word in ("--config-dir", folder)]
        if (run_dir / schema.CONFIG).is_file():
            return ["resume", "--quiet", *configs, *self.more, str(run_dir)]
        return ["run", "--quiet", *configs, *entry.overrides, as_text("run_dir", run_dir)]

    def _gather(self) -> None:
        for process in [process for process in self._running if process.poll() is not None]:
            entry, started, file, offset = self._running.pop(process)
            file.close()
            code = process.returncode
            entry.status = "done" if code == 0 else "interrupted" if code in _STOPPED else "failed"
            entry.error = _error(self.index.log(entry), offset, code) if code else None
            self.index.write()
            self.tell(entry, time.monotonic() - started)

    def _stop(self) -> None:
        """Tell whatever still runs to stop, wait for it, and at a second signal insist."""
        for process in self._running:
            process.terminate()  # not SIGINT: what comes from a shell's background ignores it
        try:
            while self._running:
                self._gather()
                time.sleep(0.05)
        except (KeyboardInterrupt, SystemExit):
            for process in self._running:
                process.terminate()
            deadline = time.monotonic() + _PATIENCE
            for process in self._running:
                try:
                    process.wait(max(deadline - time.monotonic(), 0.1))
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
            self._gather()
            raise


def _error(log: Path, offset: int, code: int) -> str:
    """Return the last line that a job printed, or what killed it."""
    if code in _STOPPED:
        return f"by {_STOPPED[code].name}"
    if code < 0:
        return f"killed by {signal.Signals(-code).name}"
    with log.open("rb") as file:
        file.seek(offset)
        printed = [line.strip() for line in file.read().decode(errors="replace").splitlines() if line.strip()]
    last = printed[-1] if printed else f"exit status {code}"
    return last.removeprefix("fedcl: error: ")[:500]
