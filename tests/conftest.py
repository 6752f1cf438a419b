from __future__ import annotations

import hashlib
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import pytest
import torch

# Before any test imports flwr or ray: no telemetry, no update checks, no installing at run time, and a Flower home of
# this session's own, so that tests neither read nor leave anything in the user's.
_FLWR_HOME = tempfile.mkdtemp(prefix="fedcl-flwr-")
os.environ.update(
    FLWR_HOME=_FLWR_HOME,
    FLWR_TELEMETRY_ENABLED="0",
    FLWR_DISABLE_UPDATE_CHECK="1",
    FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION="1",
    RAY_ENABLE_UV_RUN_RUNTIME_ENV="0",
    RAY_USAGE_STATS_ENABLED="0",
    # Ray stops blanking CUDA_VISIBLE_DEVICES for workers without a GPU, and stops warning that it will.
    RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO="0",
)

# Two processes share two cores: what they start gets one thread each, as they have themselves.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# A shell starts what runs in its background with Ctrl-C ignored, and processes inherit that: tests interrupt some.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", choices=("auto", "cpu", "cuda"), default="cpu", help="where tests with tensors run")


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(1)
    if config.getoption("--device") == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError("--device cuda: torch finds no CUDA device")


def pytest_unconfigure() -> None:
    shutil.rmtree(_FLWR_HOME, ignore_errors=True)


def _device(config: pytest.Config) -> str:
    chosen = str(config.getoption("--device"))
    return ("cuda" if torch.cuda.is_available() else "cpu") if chosen == "auto" else chosen


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if _device(config) != "cuda":
        skip = pytest.mark.skip(reason="needs a CUDA device: run with --device cuda")
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(skip)


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(_device(request.config))


@pytest.fixture(scope="session")
def data_root() -> Path:
    """Return the folder with mnist/, fashion_mnist/ and cifar100_subset.npz."""
    root = os.environ.get("FEDCL_DATA")
    if not root:
        pytest.skip("FEDCL_DATA is not set: it names the folder with mnist/, fashion_mnist/, cifar100_subset.npz")
    if not Path(root).is_dir():
        pytest.fail(f"FEDCL_DATA={root} is not a folder")
    return Path(root)


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    """One Ray for the whole session: grids find it running and leave it running."""
    import ray

    from fedcl.simulation.ray_grid import start_ray

    start_ray(None, workers=3)
    yield
    ray.shutdown()


Run = Callable[..., Path]


@pytest.fixture
def run_experiment(tmp_path: Path) -> Run:
    """Return a function that composes overrides, runs them inline and without a reference, and returns the folder."""
    from fedcl.config.compose import compose
    from fedcl.runs.experiment import run

    def run_one(name: str, *overrides: str, config_dirs: Sequence[Path] = ()) -> Path:
        fixed = ["backend=inline", "compare_with=null", "figures=false", f"run_dir={tmp_path / name}"]
        settings = [*fixed, *overrides]
        return run(compose(settings, config_dirs), settings, config_dirs, quiet=True)

    return run_one


@pytest.fixture(scope="session")
def metrics_hash() -> Callable[[Path], str]:
    """Return a function giving the SHA-256 of a run's metrics: equal runs have equal ones."""

    def digest(run_dir: Path) -> str:
        return hashlib.sha256((run_dir / "metrics.parquet").read_bytes()).hexdigest()

    return digest


@pytest.fixture(scope="session")
def end_processes() -> Callable[[str], None]:
    """Return a function that ends, by process id, every process with this setting in its environment."""

    def end(setting: str) -> None:
        deadline = time.monotonic() + 20
        while (left := _processes_with(setting)) and time.monotonic() < deadline:
            for pid in left:
                with suppress(ProcessLookupError):  # it has ended by itself meanwhile
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.2)
        assert not left

    return end


def _processes_with(setting: str) -> list[int]:
    found = []
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit() or int(folder.name) == os.getpid():
            continue
        try:
            environment = (folder / "environ").read_bytes().split(b"\0")
            state = (folder / "stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            continue  # ended meanwhile
        if setting.encode() in environment and state != "Z":
            found.append(int(folder.name))
    return found


@pytest.fixture
def one_round(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every run stop after its first round, and do all that comes before and behind it."""
    from fedcl.server.loop import Server

    whole = Server.run
    monkeypatch.setattr(Server, "run", lambda self, after_round, until=None: whole(self, after_round, 1))
