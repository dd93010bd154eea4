"""Losses of a model with its adapter: documents in, the loss of each trained token out."""
