from __future__ import annotations

from fastapi.testclient import TestClient

from qlora_service.settings import Settings


def test_models_are_listed_without_paths_of_the_machine(client: TestClient, settings: Settings) -> None:
    response = client.get("/models")
    (model,) = response.json()["data"]
    assert model["name"] == "tiny"
    assert model["architecture"] == "LlamaForCausalLM"
    assert model["max_positions"] == 512
    assert "path" not in model
    assert str(settings.models_dir.resolve()) not in response.text
