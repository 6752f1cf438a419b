"""Where a run lives and with what it runs: its folder and the description of the machine."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

from fedcl.config.value_rules import ConfigError
from fedcl.results import locking, schema

_PACKAGES = ("fedcl", "torch", "torchvision", "numpy", "flwr", "ray", "hydra-core", "safetensors", "pyarrow")
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
_TEMPORARY = re.compile(rf"\.({'|'.join(map(re.escape, (*schema.LAUNCH, schema.SUMS)))})\.[0-9a-f]{{16}}\.tmp")
_NAME = re.compile(r"[A-Za-z0-9._-]+")
_CHECKOUT = Path(__file__).resolve().parents[2]


def create_run_dir(
    path: Path | str | None, name: str, *, config: str = "", seed: int = 0, root: Path = Path("runs")
) -> Path:
    """Create the folder of a new run and return it.

    Parameters
    ----------
    path
        Folder to use; None for ``<root>/<name>/<timestamp>_<confighash>_s<seed>`` (UTC; numbered if taken).
    name
        The experiment's name: letters, digits, ``.``, ``_`` and ``-``.
    config
        Resolved configuration as text; 8 hex digits of its SHA-256 go into the default name.
    seed
        The run's seed.
    root
        Folder of all runs.

    Raises
    ------
    ValueError
        The name has other characters, or ``path`` is a file, a folder with something in it, or cannot be written.
    """
    if not _NAME.fullmatch(name) or set(name) == {"."}:
        raise ValueError(f"name={name!r}: must consist of letters, digits, '.', '_' and '-' only")
    if path is None:
        return _new_default_dir(root / name, config, seed)
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise ValueError(f"run_dir={path}: must be a folder, but is a file")
    if path.is_dir():
        refuse_used(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"run_dir={path}: cannot be created: {error.strerror}") from error
    if not os.access(path, os.W_OK | os.X_OK):
        raise ValueError(f"run_dir={path}: cannot be written to")
    return path


def refuse_used(path: Path) -> None:
    """Refuse a folder with anything in it, but for what a run leaves that died before it had written what it is.

    Raises
    ------
    ConfigError
        If there is more.
    """
    names = {entry.name for entry in path.iterdir()}
    begun = {locking.FILE, schema.OVERRIDES, schema.ENV, schema.SUMS}
    if any(name not in begun and not _TEMPORARY.fullmatch(name) for name in names):
        raise ConfigError(f"run_dir={path}: must be new or empty; choose another, or resume with: fedcl resume {path}")


def _new_default_dir(parent: Path, config: str, seed: int) -> Path:
    parent.mkdir(parents=True, exist_ok=True)
    stamp = time.strftime("%Y%m%d-%H%M%S", time.gmtime())
    stem = f"{stamp}_{hashlib.sha256(config.encode()).hexdigest()[:8]}_s{seed}"
    attempt = 1
    while True:
        path = parent / (stem if attempt == 1 else f"{stem}-{attempt}")
        try:
            path.mkdir()
        except FileExistsError:  # another run of the same second, perhaps of another process
            attempt += 1
        else:
            return path


def environment(seed: int, device: str) -> dict[str, Any]:
    """Describe what bit-equality depends on: versions, processor, threads, code; for ``env.json``.

    Parameters
    ----------
    seed
        The run's seed.
    device
        The device that the run resolved to, ``cpu`` or ``cuda``.

    Returns
    -------
    dict
        Flat but for ``packages`` (name -> version, installed ones only), ``threads`` and ``git`` (``sha``, ``dirty``;
        None when the code is not a git checkout).
    """
    import torch

    return {
        "seed": seed,
        "device": device,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": _cpu_model(),
        "cpu_count": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if device.startswith("cuda") else None,
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": {"torch": torch.get_num_threads()} | {name: os.environ.get(name) for name in _THREAD_VARIABLES},
        "packages": dict(_versions()),
        "git": _git(),
    }


@functools.cache  # a process asks for each of its runs, and looks through all that is installed
def _versions() -> dict[str, str]:
    installed = {dist.name.lower() for dist in importlib.metadata.distributions() if dist.name}
    return {name: importlib.metadata.version(name) for name in _PACKAGES if name in installed}


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _git() -> dict[str, Any] | None:
    if shutil.which("git") is None or not (_CHECKOUT / ".git").exists():
        return None
    head = _run_git("rev-parse", "HEAD")
    changes = _run_git("status", "--porcelain")
    if head is None or changes is None:
        return None
    return {"sha": head.strip(), "dirty": bool(changes.strip())}


def _run_git(*arguments: str) -> str | None:
    done = subprocess.run(["git", "-C", str(_CHECKOUT), *arguments], capture_output=True, text=True, check=False)
    return done.stdout if done.returncode == 0 else None
