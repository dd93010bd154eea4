"""JSON with one reading only: strict, and fast for ordinary rows."""
