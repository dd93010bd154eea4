"""What a resumed training depends on, on the local disk."""
