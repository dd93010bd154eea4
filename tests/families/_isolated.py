"""Trials in a process each, forked after the imports that they share."""

from __future__ import annotations

import json
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from qlora_service.process.startup import importing_torch

# Read when the libraries are first imported.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

with importing_torch():
    from tests.families._trial import Outcome, try_family
    from tests.families.tiny import FAMILIES

LIMIT_S = 240
LOG = "log"


def outcomes(model_types: Sequence[str], logs: Path | None = None) -> Iterator[Outcome]:
    """The outcome of each family; one that ends its process or runs past `LIMIT_S` is "crashed".

    `logs` receives a file per family with what its process printed.
    """
    for model_type in model_types:
        with tempfile.TemporaryDirectory(prefix="families-") as directory:
            yield _isolated(model_type, Path(directory))
            if logs is not None:
                logs.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(Path(directory, LOG), logs / f"{model_type}.log")


def _isolated(model_type: str, directory: Path) -> Outcome:
    result, log = directory / "outcome.json", directory / LOG
    pid = os.fork()
    if pid == 0:
        _run(model_type, directory, result, log)
    deadline = time.monotonic() + LIMIT_S
    while not (ended := os.waitpid(pid, os.WNOHANG))[0]:
        if time.monotonic() > deadline:
            os.killpg(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return Outcome(model_type, FAMILIES[model_type], "crashed", f"still running after {LIMIT_S} s")
        time.sleep(0.05)
    if ended[1] or not result.exists():
        tail = log.read_text(errors="replace").strip().splitlines()[-1:]
        return Outcome(model_type, FAMILIES[model_type], "crashed", f"wait status {ended[1]}: {' '.join(tail)}")
    return Outcome(**json.loads(result.read_text()))


def _run(model_type: str, directory: Path, result: Path, log: Path) -> None:
    """Runs the trial and ends this process."""
    code = 1
    try:
        os.setsid()
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        result.write_text(json.dumps(try_family(model_type, directory).as_dict()))
        code = 0
    except BaseException:  # the fork must never return into the caller
        import traceback

        traceback.print_exc()
    finally:
        os._exit(code)
