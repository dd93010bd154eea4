"""The HTTP front end: FastAPI over `qlora_service.actions`."""
