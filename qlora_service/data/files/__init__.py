"""Uploaded bytes to raw rows, and the check of a whole file."""
