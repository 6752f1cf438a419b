"""The server half of the Flower app: the same run, over a grid that Flower brings."""

from __future__ import annotations

import shlex

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the experiment that ``--run-config 'overrides="..."'`` describes, in the words of ``fedcl run``."""
    from fedcl.config import compose
    from fedcl.experiment import run

    overrides = [*shlex.split(str(context.run_config.get("overrides", ""))), "backend=flower", "compare_with=null"]
    run(compose(overrides), overrides, [], quiet=False, grid=grid)
