"""A step on meta tensors, and a model of CUDA's caching allocator for its allocations."""
