"""The trainer process: one attempt after the other."""
