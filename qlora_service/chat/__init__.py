"""Chat with base models and adapters: code shared by the API and the inference processes. No torch."""
