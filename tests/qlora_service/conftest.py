"""The control plane's fixtures for the tests of the library."""

from __future__ import annotations

from tests.control_plane import clock, database, queue

__all__ = ["clock", "database", "queue"]
