from tests.control_plane import clock, database, queue

__all__ = ["clock", "database", "queue"]
