"""Training of an adapter: the loop and every module of the service that computes with tensors for it."""
