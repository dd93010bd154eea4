"""Every system call that writes, flushes, renames, links or unlinks in submit, checkpoint, publish and finish is made
the process's last, and is made to fail: what is left must never be half of something.

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

# Read when the libraries are first imported: one thread, for a process with more cannot be forked.
os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}

from tests.chaos._crash_data import DataDirectory, prepare
from tests.chaos._crash_scenarios import SCENARIOS, Scenario
from tests.chaos._flush_order import unflushed_at_answer
from tests.chaos._syscalls import ANSWERED, Call, Fault, Run, in_fork, watch, why_not


def run(sample: float | None = None, seed: int = 0) -> dict[str, Any]:
    """What came of all points, or of a share of them and all renames:

    `points` by scenario and fault, `calls` by scenario and name in an undisturbed run, `violations` in words,
    `unflushed` for what was answered before it was on the disk, and `seconds`.

    Raises:
        OSError: the kernel does not let processes be watched.
    """
    started, chance = time.monotonic(), random.Random(seed)
    points: dict[str, dict[str, int]] = {}
    calls: dict[str, dict[str, int]] = {}
    violations: list[list[str]] = []
    unflushed: list[str] = []
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory).resolve()
        in_fork(lambda: prepare(root))
        for scenario in SCENARIOS:
            undisturbed, wrong = _try(scenario, root)
            assert undisturbed.answer is not None, undisturbed.error
            assert not wrong, f"{scenario.name} is wrong without any fault: {wrong}"
            unflushed += [f"{scenario.name}: {text}" for text in unflushed_at_answer(undisturbed.calls)]
            calls[scenario.name] = Counter(call.name for call in undisturbed.calls)
            points[scenario.name] = {
                fault: _try_all(scenario, root, fault, _places(undisturbed.calls, fault, sample, chance), violations)
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


def _places(calls: Sequence[Call], fault: Fault, sample: float | None, chance: random.Random) -> Iterable[int]:
    """The numbers, from 1, of the calls to disturb; where all are to be, without end: there may be more next time."""
    numbered = list(enumerate((call for call in calls if call is not ANSWERED), 1))
    if fault is Fault.FULL_DISK:
        numbered = [(number, call) for number, call in numbered if call.needs_room]
    elif sample is None:
        return itertools.count(1)
    if sample is None:
        return [number for number, _ in numbered]
    renames = [number for number, call in numbered if call.name.startswith("rename")]
    rest = [number for number, call in numbered if not call.name.startswith("rename")]
    return renames + chance.sample(rest, math.ceil(sample * len(rest)))


def _try_all(scenario: Scenario, root: Path, fault: Fault, places: Iterable[int], violations: list[list[str]]) -> int:
    """How many points there were; adds what is wrong at each to `violations`."""
    tried = 0
    for at in places:
        ended, wrong = _try(scenario, root, fault, at)
        if ended.hit is None:
            break
        tried += 1
        if wrong:
            violations.append([f"{scenario.name}, {fault} at {at}, {ended.hit}: {text}" for text in wrong])
    return tried


def _try(scenario: Scenario, root: Path, fault: Fault | None = None, at: int = 0) -> tuple[Run, list[str]]:
    """How the scenario went, and what is wrong afterwards."""
    directory = root / "point"
    shutil.copytree(root / scenario.start, directory)
    try:
        ended = watch(lambda answer: scenario.act(DataDirectory(directory, root), answer), directory, fault, at)
        wrong = ["it neither answered nor raised"] if ended.killed and fault is not Fault.KILL else []
        try:
            return ended, wrong + in_fork(lambda: _check(scenario, directory, root, ended.answer))
        except RuntimeError as error:
            return ended, [*wrong, f"the check failed: {error}"]
    finally:
        shutil.rmtree(directory)


def _check(scenario: Scenario, directory: Path, root: Path, answer: Any) -> list[str]:
    with DataDirectory(directory, root) as data:
        return scenario.check(data, answer)


def main(sample: float | None, seed: int) -> int:
    """Prints the figures, one JSON object a line, and what is wrong; 1 when something is."""
    if reason := why_not():
        print(json.dumps({"skipped": reason}))
        return 0
    found = run(sample, seed)
    tried = sum(sum(faults.values()) for faults in found["points"].values())
    for figure, value, unit, must, better in (
        ("crash points tried", tried, "points", None, "higher"),
        ("crash points: half-visible states", found["half_visible_states"], "states", 0, "lower"),
        ("crash points: answered before it was flushed", len(found["unflushed"]), "files", 0, "lower"),
        ("crash points: time", found["seconds"], "s", None, "lower"),
    ):
        print(json.dumps({"figure": figure, "value": value, "unit": unit, "must": must, "better": better}))
    print(json.dumps(found, indent=1), file=sys.stderr)
    return int(bool(found["violations"] or found["unflushed"]))


if __name__ == "__main__":
    sys.exit(main(float(sys.argv[1]) if sys.argv[1:] else None, int(sys.argv[2]) if sys.argv[2:] else 0))
