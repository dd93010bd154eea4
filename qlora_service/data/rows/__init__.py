"""Raw rows to training examples: every accepted row shape, read into one form."""
