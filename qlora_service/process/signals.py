"""The signals that stop a program."""

from __future__ import annotations

import signal


def stop_signals() -> tuple[signal.Signals, ...]:
    """SIGTERM, and SIGINT unless this process was started with SIGINT ignored.

    A shell starts the background processes of a script that way, so that Ctrl-C reaches the script alone.
    """
    ignores_interrupt = signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    return (signal.SIGTERM,) if ignores_interrupt else (signal.SIGTERM, signal.SIGINT)


def restore_stop_signals() -> None:
    """Undoes an ignored SIGINT or SIGTERM, which a process inherits from its parent and passes on to its children."""
    for number, default in ((signal.SIGTERM, signal.SIG_DFL), (signal.SIGINT, signal.default_int_handler)):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, default)
