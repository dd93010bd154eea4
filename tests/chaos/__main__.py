"""`python -m tests.chaos`: figures of fault tolerance in full size; exits with 1 if one misses its target.

--short        the sizes of `make test`
--only NAME    one or several of the runs
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from operator import eq, le
from pathlib import Path
from typing import Any

from qlora_service.models.catalog.catalog import Catalog
from tests.chaos import random_kills, resume_every_step, sigterm, zombies
from tests.chaos.damaged_checkpoints import damage_many
from tests.chaos.idempotency import storm
from tests.chaos.wire import attack_all
from tests.tiny_model import build_tiny_model
from tests.workspace import ROOT, Workspace

SAMPLE = "0.03"
"""Share of the crash points that the short form tries"""
RESPAWN_S, EXIT_S = 3, 8
"""Longest allowed times to the next trainer, and to the end of a stopped worker"""


@dataclass(frozen=True)
class Figure:
    """A measured figure and its target."""

    name: str
    value: float
    unit: str
    must: float | None = None
    """The exact target if `better` is "equal", else the upper bound; None for a figure without a target"""
    better: str = "lower"

    @property
    def holds(self) -> bool:
        return self.must is None or (eq if self.better == "equal" else le)(self.value, self.must)

    def line(self) -> str:
        figure = {"figure": self.name, "value": self.value, "unit": self.unit, "must": self.must, "better": self.better}
        return json.dumps(figure)


@dataclass(frozen=True)
class Place:
    """An empty directory on disk, and the tiny model."""

    directory: Path
    model: Path

    def workspace(self) -> Workspace:
        return Workspace(self.directory / "data", self.model)


def kills(place: Place, short: bool) -> Iterator[Figure]:
    target = 100 if short else 2_000
    result = random_kills.run(place.workspace(), target)
    _print_faults(result.wrong)
    by_victim = ", ".join(f"{count} of {victim}" for victim, count in result.kills.items())
    yield Figure(f"random SIGKILLs ({by_victim})", sum(result.kills.values()), "kills", target, "equal")
    yield Figure("jobs posted during the kills", result.jobs, "jobs")
    yield Figure("jobs lost", len(result.lost), "jobs", 0)
    yield Figure("jobs stuck", len(result.stuck), "jobs", 0)
    yield Figure("jobs published twice", len(result.published_twice), "jobs", 0)
    yield Figure("other differences from an undisturbed run", len(result.wrong), "findings", 0)
    yield Figure("trainer's death to the next trainer, longest", round(max(result.respawn_s), 2), "s", RESPAWN_S)
    yield Figure("trainer's imports, median", round(result.import_s, 2), "s")
    yield Figure("trainer's base load, median", round(result.base_load_s, 2), "s")


def resume(place: Place, short: bool) -> Iterator[Figure]:
    steps = 6 if short else 40
    result = resume_every_step.run(place.workspace(), steps)
    _print_faults(result.wrong)
    yield Figure("jobs killed after a step and resumed", result.resumed, "jobs", 2 * steps, "equal")
    for optim, count in result.adapters.items():
        yield Figure(f"different adapters, {optim}, killed after each of {steps} steps", count, "adapters", 1, "equal")
    yield Figure("other differences from an undisturbed job", len(result.wrong), "findings", 0)


def stops(place: Place, short: bool) -> Iterator[Figure]:
    result = sigterm.run(place.workspace(), 3 if short else 60)
    _print_faults(result.wrong)
    yield Figure("trainers stopped by SIGTERM", result.trainers, "trainers")
    yield Figure("completed steps lost", result.lost_steps, "steps", 0)
    yield Figure("SIGTERM to the worker's end, longest", max(result.exit_s), "s", EXIT_S)
    yield Figure("workers and jobs that did not stop cleanly", len(result.wrong), "jobs", 0)


def undead(place: Place, short: bool) -> Iterator[Figure]:
    result = zombies.run(place.workspace(), 20 if short else 500)
    _print_faults(result.writes_accepted)
    yield Figure("zombies: SIGSTOP until the lease expires, SIGCONT", result.zombies, "zombies")
    yield Figure("zombies whose lease holds by their own clock", result.unaware, "zombies")
    yield Figure("accepted writes of zombies", len(result.writes_accepted), "writes", 0)
    yield Figure("longest lifetime after SIGCONT", result.gone_s, "s", zombies.GONE_WITHIN_S)


def damages(place: Place, short: bool) -> Iterator[Figure]:
    result = damage_many(place.model, place.directory, 200 if short else 10_000)
    _print_faults(result.loaded + result.not_replaced)
    yield Figure("checkpoints damaged", result.damages, "checkpoints")
    yield Figure("damaged checkpoints loaded", len(result.loaded), "checkpoints", 0)
    yield Figure("damaged checkpoints not replaced by the one before", len(result.not_replaced), "checkpoints", 0)


def keys(place: Place, short: bool) -> Iterator[Figure]:
    Catalog(place.directory / "models").import_model("tiny", place.model)
    count = 50 if short else 1_000
    result = storm(place.directory, keys=count)
    _print_faults(result.wrong_keys + result.unequal_keys)
    yield Figure("kills of the API while keys were posted", result.kills, "kills")
    yield Figure(f"jobs created with {count} keys, each posted by 20 clients", result.jobs, "jobs", count, "equal")
    yield Figure("keys with no job or several", len(result.wrong_keys), "keys", 0)
    yield Figure("keys with different answers", len(result.unequal_keys), "keys", 0)


def wire(place: Place, short: bool) -> Iterator[Figure]:
    examples = 50 if short else 2_000
    result = attack_all(place.directory, place.model, examples)
    _print_faults(result.faults)
    yield Figure(f"operations of the API, each with up to {examples} requests", result.operations, "operations")
    yield Figure("operations with a 5xx or undocumented answer", len(result.faults), "faults", 0)


def crashes(place: Place, short: bool) -> Iterator[Figure]:
    yield from _run_module("tests.chaos.crash_points", *([SAMPLE] if short else []))


def claims(place: Place, short: bool) -> Iterator[Figure]:
    if short:
        print("skipped: claims; `make chaos` measures them")
    else:
        yield from _run_module("tests.chaos.claim_latency")


RUNS: dict[str, Callable[[Place, bool], Iterator[Figure]]] = {
    run.__name__: run for run in (kills, crashes, resume, stops, undead, keys, wire, damages, claims)
}


def main() -> int:
    """1 if a figure misses its target."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos")
    parser.add_argument("--short", action="store_true", help="the sizes of make test")
    parser.add_argument("--only", nargs="+", choices=sorted(RUNS), default=list(RUNS), metavar="NAME")
    arguments = parser.parse_args()
    figures = [figure for name in arguments.only for figure in _measure(name, arguments.short)]
    print("\n".join(["", *map(_row, figures)]))
    return int(not all(figure.holds for figure in figures))


def _run_module(name: str, *arguments: str) -> Iterator[Figure]:
    """The figures that a module prints in a process of its own."""
    completed = subprocess.run(
        [sys.executable, "-m", name, *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )
    figures = [json.loads(line) for line in completed.stdout.splitlines()]
    for figure in figures:
        if "skipped" in figure:
            print(f"skipped: {name}: {figure['skipped']}")
        else:
            yield Figure(figure.pop("figure"), **figure)
    if completed.returncode != 0:
        print(completed.stderr, file=sys.stderr)
        yield Figure(f"exit code of {name}", completed.returncode, "", 0)


def _print_faults(faults: list[str]) -> None:
    for fault in faults:
        print(fault, file=sys.stderr)


def _measure(name: str, short: bool) -> list[Figure]:
    """The figures of one run, each also printed at once."""
    figures = []
    # Not /tmp, which may be in memory: the figures are for a disk.
    with tempfile.TemporaryDirectory(dir="/var/tmp", prefix=f"chaos-{name}-") as directory:
        model = build_tiny_model(Path(directory) / "tiny-llama")
        for figure in RUNS[name](Place(Path(directory), model), short):
            print(figure.line(), flush=True)
            figures.append(figure)
    return figures


def _row(figure: Figure) -> str:
    sign: dict[str, Any] = {"equal": "=", "lower": "≤"}
    must = "" if figure.must is None else f"{sign[figure.better]} {figure.must:g}"
    return f"{'' if figure.holds else 'MISSED':7}{figure.value:>9g} {figure.unit:12}{must:>9}  {figure.name}"


if __name__ == "__main__":
    sys.exit(main())
