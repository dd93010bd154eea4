"""Training throughput as a share of the machine's matrix rate, fast layers only: `python -m tests.benchmarks roofline`.

Useful FLOP/s of a step over the rate of bf16 matrix products of the layers' shapes with a full micro-batch of tokens,
which is measured just before and after that step in the same process, because the host's rate drifts. Useful are 4 FLOP
per parameter and token (forward and input gradient): of the layers for all tokens, of the head for trained tokens. LoRA
and attention are not counted. The figure is the median of QLORA_BENCH_ROUNDS (3) new processes.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.benchmarks._rounds import run_rounds
from tests.benchmarks._workload import prepare
from tests.benchmarks.engine import FAST, figure


def figures() -> Iterator[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as scratch:
        runs = [measured[FAST] for measured in run_rounds((FAST,), prepare(Path(scratch)))]
    share = statistics.median(run.roofline_share for run in runs)
    rate = statistics.median(statistics.median(run.matrix_rates) for run in runs) / 1e9
    yield figure("share of the roofline", share, "share", 0.50)
    yield figure("matrix rate of the layers' shapes in bf16", rate, "GFLOP/s", None)
