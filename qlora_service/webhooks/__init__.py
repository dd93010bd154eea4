"""Telling other services how jobs ended."""
