"""Processes started by a parent that ignores signals, as a shell's background processes ignore SIGINT."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

from qlora_service.process.signals import stop_signals
from tests.workspace import ROOT

IGNORING = "import signal; [signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)]\n"
PRINT_IGNORED = "import signal; print([n for n in (2, 15) if signal.getsignal(n) is signal.SIG_IGN])"


@pytest.mark.parametrize(
    "start",
    [
        pytest.param("from qlora_service.process.child import start_python as start", id="children of the service"),
        pytest.param(
            "import subprocess, sys, tests.conftest\n"
            "def start(arguments): return subprocess.Popen([sys.executable, *arguments])",
            id="processes of the tests",
        ),
    ],
)
def test_child_ignores_no_signal_that_its_parent_ignores(start: str) -> None:
    code = f"{IGNORING}{start}\nraise SystemExit(start(['-c', {PRINT_IGNORED!r}]).wait())"
    child = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (child.stdout, child.returncode) == ("[]\n", 0), child.stderr


def test_interruption_stops_a_program_unless_it_was_started_with_sigint_ignored() -> None:
    assert stop_signals() == (signal.SIGTERM, signal.SIGINT)
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        assert stop_signals() == (signal.SIGTERM,)
    finally:
        signal.signal(signal.SIGINT, previous)
