"""`python -m fedcl` is the same as `fedcl`."""

from __future__ import annotations

import sys
from pathlib import Path

# Python puts the current directory before everything else, and a folder that somebody sent may hold a `torch.py`.
if sys.path and Path(sys.path[0]).resolve() == Path.cwd() != Path(__file__).resolve().parents[1]:
    del sys.path[0]

from fedcl.cli import main

if __name__ == "__main__":
    sys.exit(main())
