"""`python -m tests.chaos`: every figure of what jobs survive, in full size; exits with 1 when one misses.

--short        the sizes of `make test`
--only NAME    one of the runs, or several
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
"""The share of the crash points that the short form tries"""
RESPAWN_S, EXIT_S = 3, 8


@dataclass(frozen=True)
class Figure:
    """A number, and what it has to be: exactly `must` where `better` is "equal", else at most; None is told only."""

    name: str
    value: float
    unit: str
    must: float | None = None
    better: str = "lower"

    @property
    def holds(self) -> bool:
        return self.must is None or (eq if self.better == "equal" else le)(self.value, self.must)

    def line(self) -> str:
        figure = {"figure": self.name, "value": self.value, "unit": self.unit, "must": self.must, "better": self.better}
        return json.dumps(figure)


@dataclass(frozen=True)
class Place:
    """An empty directory on a disk, and the tiny model."""

    directory: Path
    model: Path

    def workspace(self) -> Workspace:
        return Workspace(self.directory / "data", self.model)


def kills(place: Place, short: bool) -> Iterator[Figure]:
    wanted = 100 if short else 2_000
    found = random_kills.run(place.workspace(), wanted)
    _show(found.wrong)
    made = ", ".join(f"{count} of {victim}" for victim, count in found.kills.items())
    yield Figure(f"random SIGKILLs ({made})", sum(found.kills.values()), "kills", wanted, "equal")
    yield Figure("jobs posted meanwhile", found.jobs, "jobs")
    yield Figure("jobs lost", len(found.lost), "jobs", 0)
    yield Figure("jobs stuck", len(found.stuck), "jobs", 0)
    yield Figure("jobs published twice", len(found.published_twice), "jobs", 0)
    yield Figure("other differences from an undisturbed run", len(found.wrong), "findings", 0)
    yield Figure("trainer's death to the next trainer, longest", round(max(found.respawn_s), 2), "s", RESPAWN_S)
    yield Figure("its imports, median", round(found.import_s, 2), "s")
    yield Figure("its base load, median", round(found.base_load_s, 2), "s")


def resume(place: Place, short: bool) -> Iterator[Figure]:
    steps = 6 if short else 40
    found = resume_every_step.run(place.workspace(), steps)
    _show(found.wrong)
    yield Figure("jobs killed after a step and resumed", found.resumed, "jobs", 2 * steps, "equal")
    for optim, count in found.adapters.items():
        yield Figure(f"different adapters, {optim}, killed after each of {steps} steps", count, "adapters", 1, "equal")
    yield Figure("other differences from an undisturbed job", len(found.wrong), "findings", 0)


def stops(place: Place, short: bool) -> Iterator[Figure]:
    found = sigterm.run(place.workspace(), 3 if short else 60)
    _show(found.wrong)
    yield Figure("trainers stopped by SIGTERM", found.trainers, "trainers")
    yield Figure("completed steps lost", found.lost_steps, "steps", 0)
    yield Figure("SIGTERM to the worker's end, longest", max(found.exit_s), "s", EXIT_S)
    yield Figure("jobs that did not wait for the next worker unharmed", len(found.wrong), "jobs", 0)


def undead(place: Place, short: bool) -> Iterator[Figure]:
    found = zombies.run(place.workspace(), 20 if short else 500)
    _show(found.writes_accepted)
    yield Figure("zombies: SIGSTOP past the lease, SIGCONT", found.zombies, "zombies")
    yield Figure("zombies that believed to have their lease", found.unaware, "zombies")
    yield Figure("zombies' writes accepted", len(found.writes_accepted), "writes", 0)
    yield Figure("longest life after SIGCONT", found.gone_s, "s", zombies.GONE_WITHIN_S)


def damages(place: Place, short: bool) -> Iterator[Figure]:
    found = damage_many(place.model, place.directory, 200 if short else 10_000)
    _show(found.loaded + found.not_replaced)
    yield Figure("checkpoints damaged", found.damages, "checkpoints")
    yield Figure("damaged checkpoints loaded", len(found.loaded), "checkpoints", 0)
    yield Figure("damaged ones for which the one before was not loaded", len(found.not_replaced), "checkpoints", 0)


def keys(place: Place, short: bool) -> Iterator[Figure]:
    Catalog(place.directory / "models").import_model("tiny", place.model)
    wanted = 50 if short else 1_000
    found = storm(place.directory, keys=wanted)
    _show(found.wrong_keys + found.unequal_keys)
    yield Figure("API killed while keys were posted", found.kills, "kills")
    yield Figure(f"jobs made of {wanted} keys, each posted by 20 clients", found.jobs, "jobs", wanted, "equal")
    yield Figure("keys without one job", len(found.wrong_keys), "keys", 0)
    yield Figure("keys with unequal answers", len(found.unequal_keys), "keys", 0)


def wire(place: Place, short: bool) -> Iterator[Figure]:
    examples = 50 if short else 2_000
    found = attack_all(place.directory, place.model, examples)
    _show(found.faults)
    yield Figure(f"operations of the API, each asked up to {examples} times", found.operations, "operations")
    yield Figure("operations that answered 5xx, or what the document does not foresee", len(found.faults), "faults", 0)


def crashes(place: Place, short: bool) -> Iterator[Figure]:
    yield from _module("tests.chaos.crash_points", *([SAMPLE] if short else []))


def claims(place: Place, short: bool) -> Iterator[Figure]:
    if short:
        print("skipped: claims; `make chaos` measures them")
    else:
        yield from _module("tests.chaos.claim_latency")


RUNS: dict[str, Callable[[Place, bool], Iterator[Figure]]] = {
    run.__name__: run for run in (kills, crashes, resume, stops, undead, keys, wire, damages, claims)
}


def _module(name: str, *arguments: str) -> Iterator[Figure]:
    """The figures that a module prints which runs in a process of its own."""
    ended = subprocess.run(
        [sys.executable, "-m", name, *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )
    figures = [json.loads(line) for line in ended.stdout.splitlines()]
    for figure in figures:
        if "skipped" in figure:
            print(f"skipped: {name}: {figure['skipped']}")
        else:
            yield Figure(figure.pop("figure"), **figure)
    if ended.returncode != 0:
        print(ended.stderr, file=sys.stderr)
        yield Figure(f"exit code of {name}", ended.returncode, "", 0)


def _show(faults: list[str]) -> None:
    for fault in faults:
        print(fault, file=sys.stderr)


def _measure(name: str, short: bool) -> list[Figure]:
    """The figures of one run, which are printed as they come."""
    figures = []
    # Not /tmp, which may lie in memory: what survives is what reached a disk.
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


def main() -> int:
    """1 when a figure misses."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos")
    parser.add_argument("--short", action="store_true", help="the sizes of make test")
    parser.add_argument("--only", nargs="+", choices=sorted(RUNS), default=list(RUNS), metavar="NAME")
    wanted = parser.parse_args()
    figures = [figure for name in wanted.only for figure in _measure(name, wanted.short)]
    print("\n".join(["", *map(_row, figures)]))
    return int(not all(figure.holds for figure in figures))


if __name__ == "__main__":
    sys.exit(main())
