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

    With ``resume`` it goes on with the run in that folder instead.
    """
    from fedcl import experiment
    from fedcl.config import compose

    interrupted = str(context.run_config.get("resume", ""))
    if interrupted:
        experiment.resume(Path(interrupted), force=False, quiet=False, grid=grid)
        return
    given = shlex.split(str(context.run_config.get("overrides", "")))
    overrides = [*given, "backend=flower", "compare_with=null", *_EVERY_ROUND]
    experiment.run(compose(overrides), overrides, [], quiet=False, grid=grid)
