"""Types shared by all packages, and the state machine of jobs. No I/O."""
