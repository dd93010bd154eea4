"""Held-out loss, generated answers, and each row's loss."""
