"""Claims jobs and runs one trainer process per slot. Never imports torch."""
