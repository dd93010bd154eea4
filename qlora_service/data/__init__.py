"""Pipeline from uploaded bytes to token ids and micro-batches. No torch."""
