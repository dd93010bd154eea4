"""Schema migrations (Alembic)."""

HEAD = "0006"
"""The newest revision"""
