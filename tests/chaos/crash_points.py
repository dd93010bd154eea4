"""Crash points: a kill or an error at every file system call of submit, checkpoint, publish and finish.

The calls are those that write, flush, rename, link or unlink. No fault may leave a partial state.

python -m tests.chaos.crash_points [SAMPLE [SEED]]
"""

from __future__ import annotations

import itertools
import json
import math
import os
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

# Read when the libraries are first imported: one thread, because a process with more cannot be forked.
os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}

from tests.chaos._crash_data import DataDirectory, prepare
from tests.chaos._crash_scenarios import SCENARIOS, Scenario
from tests.chaos._flush_order import unflushed_at_answer
from tests.chaos._syscalls import ANSWERED, Call, Fault, Run, in_fork, watch, why_unsupported


def run(sample: float | None = None, seed: int = 0) -> dict[str, Any]:
    """The outcome of all points, or with `sample` of this share of them and of all renames.

    `points` by scenario and fault, `calls` by scenario and name in an undisturbed run, `violations` as texts,
    `half_visible_states` as the number of points with violations, `unflushed` for writes that were answered before
    they were on disk, and `seconds`.

    Raises:
        OSError: the kernel does not allow processes to be watched.
    """
    started, generator = time.monotonic(), random.Random(seed)
    points: dict[str, dict[str, int]] = {}
    calls: dict[str, dict[str, int]] = {}
    violations: list[list[str]] = []
    unflushed: list[str] = []
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory).resolve()
        in_fork(lambda: prepare(root))
        for scenario in SCENARIOS:
            undisturbed, faults = _try(scenario, root)
            assert undisturbed.answer is not None, undisturbed.error
            assert not faults, f"{scenario.name} fails its check without any fault: {faults}"
            unflushed += [f"{scenario.name}: {text}" for text in unflushed_at_answer(undisturbed.calls)]
            calls[scenario.name] = Counter(call.name for call in undisturbed.calls)
            points[scenario.name] = {
                fault: _try_all(scenario, root, fault, _points(undisturbed.calls, fault, sample, generator), violations)
                for fault in scenario.faults
            }
    return {
        "points": points,
        "calls": calls,
        "violations": [text for texts in violations for text in texts],
        "half_visible_states": len(violations),
        "unflushed": unflushed,
        "seconds": round(time.monotonic() - started, 1),
    }


def main(sample: float | None, seed: int) -> int:
    """Prints the figures as JSON lines and the outcome to stderr; 1 with violations."""
    if reason := why_unsupported():
        print(json.dumps({"skipped": reason}))
        return 0
    outcome = run(sample, seed)
    tried = sum(sum(faults.values()) for faults in outcome["points"].values())
    for figure, value, unit, must, better in (
        ("crash points tried", tried, "points", None, "higher"),
        ("crash points: half-visible states", outcome["half_visible_states"], "states", 0, "lower"),
        ("crash points: answered before it was flushed", len(outcome["unflushed"]), "files", 0, "lower"),
        ("crash points: time", outcome["seconds"], "s", None, "lower"),
    ):
        print(json.dumps({"figure": figure, "value": value, "unit": unit, "must": must, "better": better}))
    print(json.dumps(outcome, indent=1), file=sys.stderr)
    return int(bool(outcome["violations"] or outcome["unflushed"]))


def _points(calls: Sequence[Call], fault: Fault, sample: float | None, generator: random.Random) -> Iterable[int]:
    """The numbers, from 1, of the calls that get the fault.

    Endless if all calls do: their number may differ from that of the undisturbed run.
    """
    numbered = list(enumerate((call for call in calls if call is not ANSWERED), 1))
    if fault is Fault.FULL_DISK:
        numbered = [(number, call) for number, call in numbered if call.needs_room]
    elif sample is None:
        return itertools.count(1)
    if sample is None:
        return [number for number, _ in numbered]
    renames = [number for number, call in numbered if call.name.startswith("rename")]
    rest = [number for number, call in numbered if not call.name.startswith("rename")]
    return renames + generator.sample(rest, math.ceil(sample * len(rest)))


def _try_all(scenario: Scenario, root: Path, fault: Fault, points: Iterable[int], violations: list[list[str]]) -> int:
    """The number of points tried; the faults found at each are added to `violations`."""
    tried = 0
    for at in points:
        outcome, faults = _try(scenario, root, fault, at)
        if outcome.hit is None:
            break
        tried += 1
        if faults:
            violations.append([f"{scenario.name}, {fault} at {at}, {outcome.hit}: {text}" for text in faults])
    return tried


def _try(scenario: Scenario, root: Path, fault: Fault | None = None, at: int = 0) -> tuple[Run, list[str]]:
    """The scenario's run with the fault, and the faults that its check finds."""
    directory = root / "point"
    shutil.copytree(root / scenario.start, directory)
    try:
        outcome = watch(lambda answer: scenario.act(DataDirectory(directory, root), answer), directory, fault, at)
        faults = ["it neither answered nor raised"] if outcome.killed and fault is not Fault.KILL else []
        try:
            return outcome, faults + in_fork(lambda: _check(scenario, directory, root, outcome.answer))
        except RuntimeError as error:
            return outcome, [*faults, f"the check failed: {error}"]
    finally:
        shutil.rmtree(directory)


def _check(scenario: Scenario, directory: Path, root: Path, answer: Any) -> list[str]:
    with DataDirectory(directory, root) as data:
        return scenario.check(data, answer)


if __name__ == "__main__":
    sys.exit(main(float(sys.argv[1]) if sys.argv[1:] else None, int(sys.argv[2]) if sys.argv[2:] else 0))
