"""Strict JSON, with a fast reader for ordinary rows."""
