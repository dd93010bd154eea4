"""Processes that do not outlive the one that started them, however it dies.

    python -m qlora_service.process.child PARENT_PID ARGUMENTS…

asks the kernel to end it with its parent and then becomes `python ARGUMENTS…`, with SIGINT and SIGTERM not ignored.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

from qlora_service.process.signals import restore_stop_signals

PR_SET_PDEATHSIG = 1  # linux/prctl.h


def start_python(
    arguments: Sequence[str],
    *,
    environment: Mapping[str, str] | None = None,
    directory: Path | None = None,
    output: IO[bytes] | None = None,
) -> subprocess.Popen[bytes]:
    """A running `python ARGUMENTS…` in a session of its own, so that a terminal's Ctrl-C reaches its parent alone.

    When this process dies without stopping it, the kernel sends it SIGTERM (Linux). Call it from the main thread: the
    kernel counts the starting thread's end as the parent's death. `output` takes what it prints; default: ours.
    """
    return subprocess.Popen(
        [sys.executable, "-m", __name__, str(os.getpid()), *arguments],
        env=environment,
        cwd=directory,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=None if output is None else subprocess.STDOUT,
        start_new_session=True,
    )


def stop(process: subprocess.Popen[bytes], grace_s: float) -> int:
    """The exit code of the process, ended with SIGTERM or, after `grace_s`, with its whole group by SIGKILL."""
    if process.poll() is None:
        process.terminate()
    try:
        return process.wait(grace_s)
    except subprocess.TimeoutExpired:
        kill_group(process)
        return process.wait()


def kill_group(process: subprocess.Popen[bytes]) -> None:
    """Kills the process and what it started in its session, unless it has been reaped."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)


def exit_when_stdin_closes() -> None:
    """Blocks until stdin closes, then exits the process with code 1.

    For a child whose stdin is a pipe that its parent holds and never writes to: the pipe closes when the parent ends.
    """
    while os.read(0, 1):
        pass
    os._exit(1)


def main(parent: int, arguments: Sequence[str]) -> None:
    restore_stop_signals()
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:
        sys.exit("the starting process has ended")
    os.execv(sys.executable, [sys.executable, *arguments])  # noqa: S606 - no shell is wanted


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
