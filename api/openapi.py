"""The FastAPI application with a corrected OpenAPI document: real request bodies and error responses."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI

from api import force
from api.openai_errors import PREFIX
from api.plan_schemas import PlanOptions


class Application(FastAPI):
    """FastAPI, with these corrections of the OpenAPI document.

    - Routes under /v1 document no 422: they answer invalid requests with 400, as OpenAI's clients expect.
    - Bodies that are a job's spec plus further fields have the schema of the spec plus those fields.
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


def _extended(schema: dict[str, Any], title: str, properties: dict[str, Any]) -> dict[str, Any]:
    return schema | {"title": title, "properties": schema["properties"] | properties}
