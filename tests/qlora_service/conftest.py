"""Fixtures of the control plane for the library's tests, and reproducible property tests."""

from __future__ import annotations

from hypothesis import settings

from tests.control_plane import clock, each_database, queue

__all__ = ["clock", "each_database", "queue"]

# No deadline, because the machine may be busy; no random seed, so that a failing run fails again.
settings.register_profile("repeatable", deadline=None, derandomize=True)
settings.load_profile("repeatable")
