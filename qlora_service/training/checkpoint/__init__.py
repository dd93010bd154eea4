"""Checkpoints on the local disk: everything that a resumed training depends on."""
