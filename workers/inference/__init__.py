"""Chat answers from the base that a trainer has loaded."""
