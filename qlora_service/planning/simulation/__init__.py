"""A step on tensors without values, replayed through a model of CUDA's caching allocator."""
