"""`python -m fedcl` is the same as `fedcl`."""

from __future__ import annotations

import sys

from fedcl.cli import main

if __name__ == "__main__":
    sys.exit(main())
