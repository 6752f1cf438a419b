"""SuperLink and SuperNodes as processes of this machine: started, waited for, and ended by their ids."""

from __future__ import annotations

import os
import secrets
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Self

from fedcl.config.value_rules import ConfigError
from fedcl.deploy.layout import Fleet

START_SECONDS = 90.0
STOP_SECONDS = 10.0
_TAG = "FEDCL_STARTED_BY"  # an environment variable that children inherit
_UNKNOWN_AUTHORITY = (7, 18, 19, 20, 21)  # OpenSSL's X509_V_ERR_*: a signature or an issuer that ca.crt does not hold


def environment() -> dict[str, str]:
    """Return the environment of Flower's commands: those beside this Python come first."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    return {**os.environ, "PATH": path}


class Processes:
    """Processes started from a fleet's folders, each with a log and a process group of its own; a context manager.

    At its end none of them is left, nor any that they started: Flower starts some in groups of their own. On a system
    without ``/proc`` those are left to themselves; Flower's end when the one that started them has.
    """

    def __init__(self, fleet: Fleet) -> None:
        self.fleet, self._tag = fleet, secrets.token_hex(16)
        self.running: dict[str, subprocess.Popen[bytes]] = {}

    def start_server(self) -> None:
        """Start the SuperLink and wait until it answers.

        Raises
        ------
        ConfigError
            If it ends, or does not answer in time; with the last lines of its log.
        """
        self._start("server", self.fleet.server)
        deadline = time.monotonic() + START_SECONDS
        while (why := unreachable(self.fleet)) is not None:
            if self.running["server"].poll() is not None or time.monotonic() > deadline:
                raise ConfigError(f"the server does not start ({why}):\n{tail(self.log('server'))}")
            time.sleep(0.3)

    def start_device(self, name: str) -> None:
        """Start a device's SuperNode; its runtime listens at a port that is free."""
        self._start(f"device-{name}", self.fleet.device(name), {"FEDCL_NODE_PORT": str(free_port())})

    def _start(self, name: str, folder: Path, extra: Mapping[str, str] | None = None) -> None:
        self.log(name).parent.mkdir(exist_ok=True)
        with self.log(name).open("ab") as log:
            self.running[name] = subprocess.Popen(
                ["/bin/sh", str(folder / "start.sh")],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**environment(), _TAG: self._tag, **(extra or {})},
                start_new_session=True,
            )

    def log(self, name: str) -> Path:
        """Return the file that holds what a process says."""
        return self.fleet.folder / "logs" / f"{name}.log"

    def stop(self, name: str, *, hard: bool = False) -> None:
        """End a process and those it started; ``hard`` leaves it no time to say goodbye."""
        process = self.running.pop(name)
        first = signal.SIGKILL if hard else signal.SIGTERM
        with suppress(ProcessLookupError):
            os.killpg(process.pid, first)
        with suppress(subprocess.TimeoutExpired):
            process.wait(STOP_SECONDS)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with undisturbed():
            for process in self.running.values():
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGTERM)
            deadline = time.monotonic() + STOP_SECONDS
            while (left := self._left()) and time.monotonic() < deadline:
                time.sleep(0.1)
            for name in [*self.running]:
                self.stop(name, hard=True)
            while left := self._left():  # one more may have been started meanwhile
                for pid in left:
                    with suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                time.sleep(0.1)

    def _left(self) -> list[int]:
        """Return the processes that are alive of those started here and of those that they started."""
        for process in self.running.values():
            process.poll()
        wanted, found = f"{_TAG}={self._tag}".encode(), []
        for folder in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):  # it has ended meanwhile, or is another user's
                zombie = (folder / "stat").read_text().rpartition(")")[2].split()[0] == "Z"
                if not zombie and wanted in (folder / "environ").read_bytes().split(b"\0"):
                    found.append(int(folder.name))
        return found


@contextmanager
def undisturbed() -> Iterator[None]:
    """Let no signal interrupt this block: it takes seconds, and what it has not ended would stay."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {signum: signal.signal(signum, signal.SIG_IGN) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def unreachable(fleet: Fleet, *, seconds: float = 5.0) -> str | None:
    """Return why the server cannot be reached as a device would reach it, or None."""
    authority = None if fleet.insecure else fleet.server / "ca.crt"
    return refusal(fleet.address, fleet.port, authority, seconds=seconds)


def refusal(address: str, port: int, authority: Path | None, *, seconds: float = 5.0) -> str | None:
    """Return why there is no way to a server whose certificate ``authority`` signed (None: no TLS), or None."""
    where = f"{address}:{port}"
    try:
        with socket.create_connection((address, port), timeout=seconds) as plain:
            if authority is not None:
                trusted = ssl.create_default_context(cafile=str(authority))
                with trusted.wrap_socket(plain, server_hostname=address):
                    pass
    except ConnectionRefusedError:
        return f"nothing listens at {where}"
    except ssl.SSLCertVerificationError as error:
        if error.verify_code in _UNKNOWN_AUTHORITY:
            return f"the certificate of {where} is refused: it was signed by another authority than {authority}"
        return f"the certificate of {where} is refused: {error.verify_message}"
    except ssl.SSLError as error:
        return f"{where} does not speak TLS: {error.reason}"
    except OSError as error:
        return f"{where} cannot be reached: {error}"
    return None


def free_port() -> int:
    """Return a port of this machine on which nothing listens now."""
    return free_ports(1)[0]


def free_ports(count: int) -> list[int]:
    """Return as many ports of this machine on which nothing listens now, each another."""
    with ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [int(probe.getsockname()[1]) for probe in probes]


def tail(file: Path, lines: int = 15) -> str:
    """Return the last lines of a log."""
    if not file.is_file():
        return ""
    return "\n".join(file.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])
