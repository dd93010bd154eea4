"""The types that every room shares, and the state machine of jobs. No I/O."""
