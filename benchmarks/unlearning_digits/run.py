"""Every unlearner on the digits: a backdoored client, a class, one sample in a hundred, four classes one by one.

    OMP_NUM_THREADS=1 python -m benchmarks.unlearning_digits.run

See README.md for the setting and the reading.
"""

from __future__ import annotations

from pathlib import Path

from benchmarks.every_unlearner import Bench, centre_checks, main

BENCH = Bench("unlearning_digits", Path(__file__).parent, label=3, mark=centre_checks(4), high=16)

if __name__ == "__main__":
    main(BENCH, __doc__ or "")
