"""The application whose OpenAPI document says what is sent and answered, and not what the framework makes of it."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI

from api import force
from api.openai_errors import PREFIX
from api.plan_schemas import PlanOptions


class Application(FastAPI):
    """Documents no 422 under /v1: there, what cannot work is a 400, as OpenAI's clients expect it.

    Bodies that are a job's spec with something beside it have the spec's schema with something beside it.
    """

    def openapi(self) -> dict[str, Any]:
        if self.openapi_schema is None:
            document = super().openapi()
            for path, operations in document["paths"].items():
                if path.startswith(PREFIX):
                    for operation in operations.values():
                        operation["responses"].pop("422", None)
            schemas = document["components"]["schemas"]
            for unused in ("HTTPValidationError", "ValidationError"):
                schemas.pop(unused, None)
            spec, options = schemas["JobSpec"], PlanOptions.model_json_schema()
            schemas["JobRequest"] = _extended(spec, "JobRequest", {force.NAME: force.SCHEMA})
            schemas["PlanRequest"] = _extended(spec, "PlanRequest", options["properties"]) | {
                "description": options["description"],
                "required": [],
            }
        assert self.openapi_schema is not None
        return self.openapi_schema


def _extended(schema: dict[str, Any], title: str, more: dict[str, Any]) -> dict[str, Any]:
    return schema | {"title": title, "properties": schema["properties"] | more}
