"""The application whose OpenAPI document says what is answered under /v1, and not what the framework would answer."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI

from api.openai_errors import PREFIX


class Application(FastAPI):
    """Documents no 422 under /v1: there, what cannot work is a 400, as OpenAI's clients expect it."""

    def openapi(self) -> dict[str, Any]:
        if self.openapi_schema is None:
            document = super().openapi()
            for path, operations in document["paths"].items():
                if path.startswith(PREFIX):
                    for operation in operations.values():
                        operation["responses"].pop("422", None)
            for unused in ("HTTPValidationError", "ValidationError"):
                document["components"]["schemas"].pop(unused, None)
        assert self.openapi_schema is not None
        return self.openapi_schema
