"""The server half of the Flower app: the same run, over a grid that Flower brings."""

from __future__ import annotations

import importlib.util
import os
import shlex
import sys
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedcl.simulation.nodes import SERVER_FOLDER, read_order

app = ServerApp()
# devices keep the states of the last few visits only: a server that is resumed must not be older than that
_EVERY_ROUND = ("checkpoint.every=1", "checkpoint.min_seconds=0")
# a bundle of the repository carries no figures: `fedcl report` draws them afterwards
PAGE = [] if importlib.util.find_spec("fedcl.results.figures") else ["figures=false"]


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the experiment that ``overrides`` of the run's configuration describes, in the words of ``fedcl run``.

    ``config_dirs`` are folders with choices of the user's. With ``resume`` it goes on with the run in that folder
    instead, and runs code from ``config_dirs`` only. On a fleet's server all this is what ``fedcl deploy`` has written
    down there: what is in the run's configuration goes to devices too, and whoever submits a run could write anything
    there.

    Raises
    ------
    ConfigError
        If a server's folder says nothing of this run.
    """
    from fedcl.config.compose import compose
    from fedcl.config.own_code import add_plugin_paths
    from fedcl.results.launches import Trust
    from fedcl.runs import experiment

    run = str(context.run_config.get("run", ""))
    print("fleet: the run's process has started", file=sys.stderr, flush=True)
    told = context.run_config if SERVER_FOLDER not in os.environ else read_order(Path(os.environ[SERVER_FOLDER]), run)
    interrupted = str(told.get("resume", ""))
    given = shlex.split(str(told.get("overrides", "")))
    folders = [Path(folder) for folder in shlex.split(str(told.get("config_dirs", "")))]
    add_plugin_paths(folders, outside=[Path(interrupted)] if interrupted else [])
    overrides = [*given, "backend=flower", "compare_with=null", *_EVERY_ROUND, *PAGE]
    try:
        if interrupted:
            trust = Trust(tuple(folders))
            experiment.resume(Path(interrupted), force=False, quiet=False, grid=grid, trust=trust)
        else:
            experiment.run(compose(overrides, folders), overrides, folders, quiet=False, grid=grid)
    except (KeyboardInterrupt, SystemExit) as stop:
        raise RuntimeError("interrupted") from stop  # Flower's runner lets go of its threads for an Exception alone
