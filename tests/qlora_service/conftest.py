"""The control plane's fixtures for the tests of the library, and property tests that do not depend on the day."""

from __future__ import annotations

from hypothesis import settings

from tests.control_plane import clock, each_database, queue

__all__ = ["clock", "each_database", "queue"]

# A busy machine is no failure, and a run that found a fault must find it again.
settings.register_profile("repeatable", deadline=None, derandomize=True)
settings.load_profile("repeatable")
