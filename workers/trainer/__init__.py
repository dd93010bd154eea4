"""The trainer process: runs one attempt after the other."""
