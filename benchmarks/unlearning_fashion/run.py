"""Every unlearner on Fashion-MNIST: a backdoored client, a class, one sample in a hundred, four classes one by one.

    FEDCL_DATA=<folder with fashion_mnist/> OMP_NUM_THREADS=1 python -m benchmarks.unlearning_fashion.run

See README.md for the setting and the reading.
"""

from __future__ import annotations

from pathlib import Path

from benchmarks.every_unlearner import Bench, centre_checks, main

BENCH = Bench("unlearning_fashion", Path(__file__).parent, label=5, mark=centre_checks(6), high=255)

if __name__ == "__main__":
    main(BENCH, __doc__ or "")
