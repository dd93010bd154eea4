"""Routes of the service's own API."""
