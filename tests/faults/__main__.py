"""``python -m faults``: the runs that docs/reliability.md reports."""

from __future__ import annotations

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # before NumPy: this process is forked

from faults.command import faults

faults(prog_name="faults")
