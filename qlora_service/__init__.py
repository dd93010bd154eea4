"""The library: everything that decides. `api` and `workers` are thin programs over it."""
