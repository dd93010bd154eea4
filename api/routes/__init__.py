"""This service's own routes."""
