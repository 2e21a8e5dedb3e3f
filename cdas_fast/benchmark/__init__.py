"""Ops and a training step side by side with the alternatives: time, memory and error, as a table, JSON and a plot.

`python -m cdas_fast.benchmark` is the process in which `memory.peak_in_child` measures; the command is
`cdas-fast bench`.
"""

from cdas_fast.benchmark.intervention import bench_interchange
from cdas_fast.benchmark.loss import bench_loss
from cdas_fast.benchmark.report import Report
from cdas_fast.benchmark.training import bench_train

__all__ = ["Report", "bench_interchange", "bench_loss", "bench_train"]
