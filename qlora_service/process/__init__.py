"""Child processes, start-up, flushing to disk, log lines."""
