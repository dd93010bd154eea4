"""Chat answers from the base model that a trainer has loaded."""
