"""Webhooks: signed notifications about jobs that have ended."""
