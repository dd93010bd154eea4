from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from api.main import create_app
from api.plan_schemas import PlanOptions
from qlora_service.settings import Settings
from qlora_service.specs import JobSpec
from tests.api.conftest import ROOT, URL, scratch_files

CONTRACT = {
    ("post", "/datasets"): {409, 413, 422, 503},
    ("get", "/datasets"): {422},
    ("get", "/datasets/{dataset_id}"): {404, 422},
    ("get", "/datasets/{dataset_id}/preview"): {404, 422},
    ("get", "/models"): {422},
    ("get", "/recipes"): {422},
    ("post", "/jobs"): {400, 404, 409, 413, 415, 422, 429, 503},
    ("get", "/jobs"): {422},
    ("get", "/jobs/{job_id}"): {404, 422},
    ("post", "/jobs/{job_id}/cancel"): {404, 409, 422, 503},
    ("post", "/jobs/{job_id}/pause"): {404, 409, 422, 503},
    ("post", "/jobs/{job_id}/resume"): {404, 409, 422, 503},
    ("get", "/jobs/{job_id}/metrics"): {404, 422},
    ("get", "/jobs/{job_id}/events"): {404, 422},
    ("get", "/jobs/{job_id}/artifacts"): {404, 409, 422},
    ("get", "/jobs/{job_id}/artifacts/{name}"): {404, 409, 416, 422},
    ("get", "/jobs/{job_id}/adapter.zip"): {404, 409, 422},
    ("post", "/keys"): {400, 409, 413, 422, 503},
    ("post", "/plans"): {400, 404, 413, 422, 503},
    ("get", "/plans/accuracy"): {422},
    ("get", "/keys"): {422},
    ("delete", "/keys/{key_id}"): {404, 409, 422, 503},
    ("delete", "/datasets/{dataset_id}"): {404, 409, 422, 503},
    ("get", "/jobs/{job_id}/metrics.csv"): {404, 422},
    ("post", "/v1/files"): {400, 409, 413, 503},
    ("get", "/v1/files"): {400},
    ("get", "/v1/files/{file_id}"): {400, 404},
    ("delete", "/v1/files/{file_id}"): {400, 404, 409, 503},
    ("get", "/v1/files/{file_id}/content"): {400, 404},
    ("post", "/v1/uploads"): {400, 409, 413, 415, 503},
    ("post", "/v1/uploads/{upload_id}/parts"): {400, 404, 409, 413, 503},
    ("post", "/v1/uploads/{upload_id}/complete"): {400, 404, 409, 413, 415, 503},
    ("post", "/v1/uploads/{upload_id}/cancel"): {400, 404, 409, 503},
    ("post", "/v1/fine_tuning/jobs"): {400, 404, 409, 413, 415, 503},
    ("get", "/v1/fine_tuning/jobs"): {400},
    ("get", "/v1/fine_tuning/jobs/{fine_tuning_job_id}"): {400, 404},
    ("post", "/v1/fine_tuning/jobs/{fine_tuning_job_id}/cancel"): {400, 404, 409, 503},
    ("post", "/v1/fine_tuning/jobs/{fine_tuning_job_id}/pause"): {400, 404, 409, 503},
    ("post", "/v1/fine_tuning/jobs/{fine_tuning_job_id}/resume"): {400, 404, 409, 503},
    ("get", "/v1/fine_tuning/jobs/{fine_tuning_job_id}/events"): {400, 404},
    ("get", "/v1/fine_tuning/jobs/{fine_tuning_job_id}/checkpoints"): {400, 404},
    ("get", "/v1/models"): {400},
    ("get", "/v1/models/{model}"): {400, 404},
    ("delete", "/v1/models/{model}"): {400, 404, 409, 503},
    ("post", "/v1/chat/completions"): {400, 404, 413, 415, 503},
    ("post", "/v1/completions"): {400, 404, 413, 415, 503},
    ("get", "/events"): {422},
    ("get", "/v1/webhook_event_types"): {400},
    ("post", "/v1/webhook_endpoints"): {400, 409, 413, 415, 503},
    ("get", "/v1/webhook_endpoints"): {400},
    ("get", "/v1/webhook_endpoints/{webhook_endpoint_id}"): {400, 404},
    ("post", "/v1/webhook_endpoints/{webhook_endpoint_id}"): {400, 404, 409, 413, 415, 503},
    ("delete", "/v1/webhook_endpoints/{webhook_endpoint_id}"): {400, 404, 503},
    ("get", "/v1/webhook_endpoints/{webhook_endpoint_id}/deliveries"): {400, 404},
    ("post", "/v1/webhook_endpoints/{webhook_endpoint_id}/rotate_secret"): {400, 404, 409, 413, 415, 503},
    ("post", "/v1/webhook_endpoints/{webhook_endpoint_id}/test"): {400, 404, 409, 413, 415, 503},
    ("get", "/healthz"): set(),
    ("get", "/readyz"): {503},
}
HEAVY = ["torch", "transformers", "datasets", "peft", "bitsandbytes", "numpy", "pandas"]


@pytest.fixture(scope="module")
def openapi(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return create_app(Settings(data_dir=tmp_path_factory.mktemp("data"))).openapi()


def test_importing_the_application_imports_no_torch() -> None:
    code = f"import sys, api.main; print([name for name in {HEAVY} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_every_route_and_its_errors_are_documented(openapi: dict[str, Any]) -> None:
    operations = {
        (method, path): operation for path, methods in openapi["paths"].items() for method, operation in methods.items()
    }
    assert operations.keys() == CONTRACT.keys()
    for route, errors in CONTRACT.items():
        operation = operations[route]
        assert operation["summary"], route
        assert operation["description"], route
        assert operation["tags"], route
        documented = {int(status) for status in operation["responses"] if status >= "400"}
        always = {400, 408, 500, 503} | (set() if "health" in operation["tags"] else {401, 403, 429})
        assert documented == errors | always, route
        for status in documented:
            (content,) = operation["responses"][str(status)]["content"].values()
            shape = "OpenAIErrorResponse" if route[1].startswith("/v1/") else "ErrorResponse"
            assert content["schema"] == {"$ref": f"#/components/schemas/{shape}"}, route
            assert content["example"]["error"]["message"], route


def test_every_post_that_changes_something_accepts_an_idempotency_key(openapi: dict[str, Any]) -> None:
    posts = {path: methods["post"] for path, methods in openapi["paths"].items() if "post" in methods}
    del posts["/v1/chat/completions"], posts["/v1/completions"], posts["/plans"]
    assert posts
    for path, operation in posts.items():
        headers = {parameter["name"] for parameter in operation["parameters"] if parameter["in"] == "header"}
        assert headers == {"Idempotency-Key"}, path


def test_the_frameworks_own_error_schema_is_not_documented(openapi: dict[str, Any]) -> None:
    assert "HTTPValidationError" not in openapi["components"]["schemas"]


def test_job_body_documents_the_spec_as_json_and_as_form(openapi: dict[str, Any]) -> None:
    content = openapi["paths"]["/jobs"]["post"]["requestBody"]["content"]
    request = {"$ref": "#/components/schemas/JobRequest"}
    assert content["application/json"]["schema"] == request
    assert content["multipart/form-data"]["schema"]["properties"]["config"] == request
    schema = openapi["components"]["schemas"]["JobRequest"]
    assert schema["properties"].keys() == {*JobSpec.model_fields, "force"}
    assert schema["required"] == ["base_model"]
    assert schema["additionalProperties"] is False


def test_plan_body_is_a_spec_plus_plan_options(openapi: dict[str, Any]) -> None:
    schema = openapi["components"]["schemas"]["PlanRequest"]
    assert schema["properties"].keys() == {*JobSpec.model_fields, *PlanOptions.model_fields}
    assert schema["required"] == []


def test_every_reference_of_the_document_resolves(openapi: dict[str, Any]) -> None:
    def references(value: Any) -> list[str]:
        if isinstance(value, dict):
            own = [value["$ref"]] if isinstance(value.get("$ref"), str) else []
            return own + [name for child in value.values() for name in references(child)]
        return [name for child in value for name in references(child)] if isinstance(value, list) else []

    known = {f"#/components/schemas/{name}" for name in openapi["components"]["schemas"]}
    assert references(openapi)
    assert set(references(openapi)) <= known


def test_examples_of_job_bodies_are_valid_specs(openapi: dict[str, Any]) -> None:
    from qlora_service.specs import parse_spec

    examples = openapi["paths"]["/jobs"]["post"]["requestBody"]["content"]["application/json"]["examples"]
    for example in examples.values():
        assert parse_spec(example["value"]).base_model


def test_start_deletes_scratch_files_of_a_killed_process(settings: Settings) -> None:
    leftover: Path = settings.tmp_dir / ".staging-0123456789abcdef" / "tmp1" / "body"
    leftover.parent.mkdir(parents=True)
    leftover.write_bytes(b"half an upload")
    with TestClient(create_app(settings)), TestClient(create_app(settings), URL) as second:
        # The scratch directory of the first process survives the start of the second.
        assert scratch_files(settings) == []
        assert len(list(settings.tmp_dir.iterdir())) == 2
        assert second.get("/readyz").status_code == 200
    assert list(settings.tmp_dir.iterdir()) == []
