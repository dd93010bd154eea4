"""A model with its adapter: documents in, the loss of each trained token out."""
