"""What compressing, fitting, jumping and writing cost, each beside a reference, a target and a floor.

    python -m benchmarks.speed all                  # every stage, then the table in docs/benchmarks/speed.md
    python -m benchmarks.speed compress-0.5B        # one stage; its JSON and the table are written anew
    python -m benchmarks.speed table                # only the table, from the committed results; runs nothing
    python -m benchmarks.speed all --toy            # every stage at toy size, results printed and not kept

What is measured, and what is not: docs/benchmarks/speed.md.
"""

from __future__ import annotations

import os

# One thread, so that CPU-seconds can be compared: set here because BLAS reads these when torch and SciPy are imported.
for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ[_name] = "1"
