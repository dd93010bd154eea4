"""Chatting with base models and adapters: what the API and the processes that have them loaded share. No torch."""
