"""Evaluation of an adapter: held-out loss, generated answers, and the loss of every training row."""
