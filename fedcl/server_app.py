"""The server half of the Flower app: the same run, over a grid that Flower brings."""

from __future__ import annotations

import shlex
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

app = ServerApp()
# devices keep the states of the last few visits only: a server that is resumed must not be older than that
_EVERY_ROUND = ("checkpoint.every=1", "checkpoint.min_seconds=0")


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the experiment that ``overrides`` of the run's configuration describes, in the words of ``fedcl run``.

    ``config_dirs`` are folders with choices of the user's. With ``resume`` it goes on with the run in that folder
    instead, and runs code from ``config_dirs`` only.
    """
    from fedcl import experiment
    from fedcl.building import add_plugin_paths
    from fedcl.config import compose
    from fedcl.launches import Trust

    folders = [Path(folder) for folder in shlex.split(str(context.run_config.get("config_dirs", "")))]
    interrupted = str(context.run_config.get("resume", ""))
    if interrupted:
        add_plugin_paths(folders, outside=[Path(interrupted)])
        trust = Trust(tuple(folders))
        experiment.resume(Path(interrupted), force=False, quiet=False, grid=grid, trust=trust)
        return
    given = shlex.split(str(context.run_config.get("overrides", "")))
    add_plugin_paths(folders)
    overrides = [*given, "backend=flower", "compare_with=null", *_EVERY_ROUND]
    experiment.run(compose(overrides, folders), overrides, folders, quiet=False, grid=grid)
