"""How the schema came to be, for Alembic."""

HEAD = "0005"
"""The newest revision"""
