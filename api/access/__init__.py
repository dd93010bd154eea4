"""Who may send a request: keys, origins, request rates."""
