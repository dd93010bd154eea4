"""Claims jobs and starts a trainer per slot. Never imports torch."""
