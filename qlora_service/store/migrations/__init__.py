"""Schema migrations (Alembic)."""

HEAD = "0005"
"""The newest revision"""
