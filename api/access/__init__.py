"""Access control: API keys, origins, request rates."""
