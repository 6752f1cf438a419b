"""The jobs of a sweep as processes of their own: a crash costs one job, a signal none."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from fedcl.overrides import as_text
from fedcl.results import schema
from fedcl.rules import ConfigError
from fedcl.sweep.index import Entry, Index

try:
    import fcntl
except ImportError:  # where there is none, two sweeps in one folder are not told apart
    fcntl = None  # type: ignore[assignment]

_STOPPED = {130: signal.SIGINT, 143: signal.SIGTERM, -signal.SIGINT: signal.SIGINT, -signal.SIGTERM: signal.SIGTERM}
# exit status -> the signal behind it: a run's own, or the bare process's where it came too early for the run
_PATIENCE = 60.0  # seconds that a job told twice to stop is waited for


@contextmanager
def locked(folder: Path) -> Iterator[int | None]:
    """Hold the sweep's folder; jobs hold it too, so that one that outlived its sweep is not started a second time.

    Raises
    ------
    ConfigError
        If a sweep, or a job of one, is at work there.
    """
    with (folder / ".lock").open("w") as file:
        if fcntl is not None:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                said = f"sweep_dir={folder}: a sweep, or a job of one, is at work there; wait for it, or stop it first"
                raise ConfigError(said) from error
        yield None if fcntl is None else file.fileno()


@dataclass
class Jobs:
    """Plays a sweep's jobs, so many ``at_once``; ``tell`` is called with each when it has ended."""

    index: Index
    at_once: int
    lock: int | None
    tell: Callable[[Entry, float], None]
    _running: dict[subprocess.Popen[bytes], tuple[Entry, float, IO[bytes], int]] = field(default_factory=dict)

    def play(self, entries: Iterable[Entry]) -> None:
        """Play them all. Where a signal comes, each job finishes its round and is left to be gone on with.

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
        if run_dir.is_dir() and not (run_dir / schema.CONFIG).is_file():
            shutil.rmtree(run_dir)  # it died before it had written what it is
        file = log.open("ab")
        entry.status, entry.error = "running", None
        self.index.write()
        process = subprocess.Popen(
            [sys.executable, "-m", "fedcl", *self._words(entry, run_dir)],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            pass_fds=() if self.lock is None else (self.lock,),
            start_new_session=True,  # Ctrl-C reaches the sweep alone, which tells its jobs once
        )
        self._running[process] = (entry, time.monotonic(), file, file.tell())

    def _words(self, entry: Entry, run_dir: Path) -> list[str]:
        if (run_dir / schema.CONFIG).is_file():
            return ["resume", "--quiet", str(run_dir)]
        configs = [word for folder in self.index.config_dirs for word in ("--config-dir", folder)]
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
    """Return what a job said last, or what killed it."""
    if code in _STOPPED:
        return f"by {_STOPPED[code].name}"
    if code < 0:
        return f"killed by {signal.Signals(-code).name}"
    with log.open("rb") as file:
        file.seek(offset)
        said = [line.strip() for line in file.read().decode(errors="replace").splitlines() if line.strip()]
    last = said[-1] if said else f"exit status {code}"
    return last.removeprefix("fedcl: error: ")[:500]
