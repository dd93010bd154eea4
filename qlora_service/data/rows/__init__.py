"""Raw rows to training examples: the shapes of the field, read into one form."""
