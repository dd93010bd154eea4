"""Rounds of runs, each run in a new process, with the order reversed in every second round."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from tests.benchmarks._measurement import Run
from tests.benchmarks._workload import ROOT, Workload

THREADS = 2
ROUNDS = int(os.environ.get("QLORA_BENCH_ROUNDS", "3"))

Contestant = tuple[str, str]
"""Module (`_ours` or `_trl`) and setting of a measured side"""


def run_rounds(contestants: Sequence[Contestant], work: Workload) -> list[dict[Contestant, Run]]:
    """The measurements of every round by contestant; every run is also printed to stderr as a JSON line."""
    rounds = []
    for index in range(ROUNDS):
        order = contestants if index % 2 == 0 else contestants[::-1]
        rounds.append({contestant: _run(contestant, work, index + 1) for contestant in order})
    return rounds


def _run(contestant: Contestant, work: Workload, round_: int) -> Run:
    module, setting = contestant
    threads = str(THREADS)
    environment = os.environ | {
        "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }
    # Started through `process.child`, which ends the run when the benchmark dies.
    command = [sys.executable, "-m", "qlora_service.process.child", str(os.getpid())]
    command += ["-m", f"tests.benchmarks.{module}", setting, json.dumps(asdict(work))]
    child = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if child.returncode != 0:
        tail = "\n".join(child.stderr.strip().splitlines()[-15:])
        sys.exit(f"the run of {module}, {setting}, ended with code {child.returncode}:\n{tail}")
    measured: dict[str, Any] = json.loads(child.stdout.splitlines()[-1])  # TRL prints its log first
    print(json.dumps({"round": round_, "side": module, "setting": setting, **measured}), file=sys.stderr, flush=True)
    return Run(**measured)
