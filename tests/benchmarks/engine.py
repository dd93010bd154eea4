"""Training throughput and memory, this service against TRL's `SFTTrainer`: `python -m tests.benchmarks engine`.

Six runs per round, each in a new process: this service's fast and general layers, and TRL with padded rows (4 × 4) or
packs (2 × 2 of up to 1,024 tokens), each with and without gradient checkpointing. Padded rows with checkpointing are
TRL's default. Every run trains on the same 64 examples after a warm-up of 16; see `_workload`. There are
QLORA_BENCH_ROUNDS rounds (3), the order reversed in every second one; a figure is their median, a ratio the median of
the rounds' ratios. Run it alone on the machine: load on one of the cores slows a step by a factor of 3 to 10.

- useful tokens/s: tokens of the examples, without padding, over the seconds per step;
- share of the roofline: see `roofline`;
- peak RSS: of the whole process; the ratio is over TRL's padded rows without checkpointing;
- time outside forward/backward/optimizer: cost of the loop itself (rows, packing, collation, checks, metrics).

The benchmark ends with an error unless both sides did the same work: the same number of useful and trained tokens, and
losses of the first step, on the same 16 rows, that agree within 2 %.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tests.benchmarks._measurement import Run
from tests.benchmarks._rounds import Contestant, run_rounds
from tests.benchmarks._workload import prepare

FAST: Contestant = ("_ours", "fast")
GENERAL: Contestant = ("_ours", "general")
TRL_DEFAULT: Contestant = ("_trl", "padded, checkpointing")
TRL_PADDED: Contestant = ("_trl", "padded")
TRL: tuple[Contestant, ...] = (
    TRL_DEFAULT,
    TRL_PADDED,
    ("_trl", "packed, checkpointing"),
    ("_trl", "packed"),
)
LOSS_TOLERANCE = 0.02

Round = dict[Contestant, Run]


def figures() -> Iterator[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as scratch:
        rounds = run_rounds((FAST, *TRL, GENERAL), prepare(Path(scratch)))
    for measured in rounds:
        check_same_work(measured)

    def median(value: Callable[[Round], float]) -> float:
        return statistics.median(value(measured) for measured in rounds)

    def over_best(ours: Contestant) -> float:
        return median(lambda r: r[ours].tokens_per_second / max(r[trl].tokens_per_second for trl in TRL))

    over_default = median(lambda r: r[FAST].tokens_per_second / r[TRL_DEFAULT].tokens_per_second)
    memory = median(lambda r: r[FAST].peak_rss_bytes / r[TRL_PADDED].peak_rss_bytes)
    outside = median(lambda r: r[FAST].outside_share)
    yield figure("useful tokens/s over TRL 1.16's default", over_default, "x", 3.5)
    yield figure("useful tokens/s over the best of TRL's four settings", over_best(FAST), "x", 3.0)
    yield figure("general path alone, over TRL's best", over_best(GENERAL), "x", 2.0)
    yield figure("share of the roofline", median(lambda r: r[FAST].roofline_share), "share", 0.50)
    yield figure("peak RSS over TRL without checkpointing, same examples per step", memory, "x", 0.55, better="lower")
    yield figure(
        "time in our code outside forward/backward/optimizer, per step", outside, "share", 0.02, better="lower"
    )
    for contestant in (FAST, GENERAL, *TRL):
        yield from _absolutes(contestant, [measured[contestant] for measured in rounds])


def figure(name: str, value: float, unit: str, must: float | None, better: str = "higher") -> dict[str, Any]:
    """A figure in the format of all benchmarks."""
    return {"figure": name, "value": float(f"{value:.4g}"), "unit": unit, "must": must, "better": better}


def check_same_work(measured: Round) -> None:
    """Ends the program unless all runs of a round did the same work."""
    ours = measured[FAST]
    for (module, setting), run in measured.items():
        for kind, expected, actual in (
            ("useful", sum(ours.tokens[1:]), sum(run.tokens[1:])),
            ("trained", sum(ours.trained_tokens[1:]), sum(run.trained_tokens[1:])),
        ):
            if expected != actual:
                sys.exit(f"not the same work: {kind} tokens are {expected} for ours, {actual} for {module}, {setting}")
    for contestant in (GENERAL, TRL_DEFAULT, TRL_PADDED):
        first, other = ours.losses[0], measured[contestant].losses[0]
        if not abs(first - other) <= LOSS_TOLERANCE * other:  # also if one is NaN
            sys.exit(
                f"not the same work: the first step's loss is {first:.4f} for ours, {other:.4f} for "
                f"{', '.join(contestant)}"
            )


def _absolutes(contestant: Contestant, runs: list[Run]) -> Iterator[dict[str, Any]]:
    side, setting = contestant
    name = f"{'ours' if side == '_ours' else 'TRL'} {setting}"

    def median(value: Callable[[Run], float]) -> float:
        return statistics.median(map(value, runs))

    yield figure(f"{name}: useful tokens/s", median(lambda run: run.tokens_per_second), "tokens/s", None)
    yield figure(f"{name}: peak RSS", median(lambda run: run.peak_rss_bytes / 1e9), "GB", None, better="lower")
    yield figure(f"{name}: share of the roofline", median(lambda run: run.roofline_share), "share", None)
    yield figure(f"{name}: matrix rate", median(lambda r: statistics.median(r.matrix_rates) / 1e9), "GFLOP/s", None)
    yield figure(f"{name}: loss of the first step", median(lambda run: run.losses[0]), "nats", None, better="lower")
    yield figure(f"{name}: loss of the last step", median(lambda run: run.losses[-1]), "nats", None, better="lower")
