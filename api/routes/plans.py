"""Plans: whether a job fits, and the settings it would run with."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from pydantic import ValidationError
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request

from api.dependencies import ServiceOf
from api.errors import SPEC_LOCATIONS, error_locations, error_responses
from api.http.json_body import parse_body
from api.http.uploads import receive_bytes
from api.plan_schemas import Plan, PlanOptions
from qlora_service.actions.plans import UNNAMED_MODEL
from qlora_service.actions.service import Service
from qlora_service.errors import Finding, InvalidModel, InvalidSpec, QLoRAError
from qlora_service.specs import parse_spec

router = APIRouter(prefix="/plans", tags=["plans"])

_MAX_BODY_BYTES = 2**20
_LOCATIONS_WITH_CONFIG: dict[type[QLoRAError], str] = {InvalidModel: "/config"}
_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {
                "schema": {"$ref": "#/components/schemas/PlanRequest"},
                "examples": {
                    "a base model of the catalog": {
                        "value": {"base_model": "SmolLM2-135M-Instruct", "training": {"max_seq_len_tokens": 512}}
                    },
                    "a stored dataset": {
                        "value": {
                            "base_model": "SmolLM2-135M-Instruct",
                            "dataset": {"id": "ds_019a9c2f8d31c4e55f0a7b"},
                            "adapter": {"r": 8},
                        }
                    },
                    "no weights, no GPU": {
                        "value": {
                            "config": {
                                "model_type": "llama",
                                "hidden_size": 8192,
                                "intermediate_size": 28672,
                                "num_hidden_layers": 80,
                                "num_attention_heads": 64,
                                "num_key_value_heads": 8,
                                "vocab_size": 128256,
                            },
                            "training": {"max_seq_len_tokens": 512, "batch_size": 1},
                            "device": "RTX 3090",
                        }
                    },
                },
            }
        },
    }
}


@router.post("", summary="Plan a job", responses=error_responses(404, 413, 422), openapi_extra=_BODY)
async def make_plan(request: Request, service: ServiceOf) -> Plan:
    """Plan a job: whether it fits on this service's device or on a named card, and its memory by category.

    `base_model` names a model of the catalog; `config`, the content of a config.json, plans for a model that is not in
    the catalog. The response is immediate if a formula is certain, and takes some seconds if a step must be simulated.
    Nothing is stored.
    """
    return await run_in_threadpool(_plan, service, await receive_bytes(request, _MAX_BODY_BYTES))


def _plan(service: Service, body: bytes) -> Plan:
    document = parse_body(body)
    if not isinstance(document, dict):
        raise InvalidSpec("/: this must be an object with fields", location="/")
    options = _options({name: document.pop(name) for name in PlanOptions.model_fields if name in document})
    if options.config is not None:
        if "base_model" in document:
            raise InvalidSpec("base_model and config name two models: leave one of them out", location="/config")
        document["base_model"] = UNNAMED_MODEL
    spec = parse_spec(document)
    with error_locations(SPEC_LOCATIONS if options.config is None else _LOCATIONS_WITH_CONFIG):
        plan = service.plans.plan(
            spec, config=options.config, device=options.device, free_bytes=options.free_bytes, probe=options.probe
        )
    return Plan.of(plan)


def _options(fields: dict[str, Any]) -> PlanOptions:
    """Raises: InvalidSpec."""
    try:
        return PlanOptions.model_validate(fields)
    except ValidationError as error:
        findings = [
            Finding(fault["msg"], pointer="".join(f"/{part}" for part in fault["loc"])) for fault in error.errors()
        ]
        raise InvalidSpec(str(findings[0]), location=findings[0].pointer, findings=findings) from None
