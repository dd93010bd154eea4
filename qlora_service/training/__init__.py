"""The training loop, and everything with tensors that it needs."""
