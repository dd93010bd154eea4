from __future__ import annotations

from fastapi.testclient import TestClient

from qlora_service.specs import RECIPES
from tests.api.conftest import spec_of


def test_recipes_are_listed_with_sources_and_values(bare_client: TestClient) -> None:
    recipes = bare_client.get("/recipes").json()["data"]
    assert [recipe["name"] for recipe in recipes] == list(RECIPES)
    assert "arXiv:2305.14314" in recipes[0]["source"]
    assert recipes[0]["values"]["adapter"]["r"] == 64
    assert all(recipe["title"] for recipe in recipes)


def test_job_is_stored_with_the_values_of_its_recipe(client: TestClient, dataset_id: str) -> None:
    spec = spec_of(dataset_id, recipe="lit-llama-alpaca", training={"max_seq_len_tokens": 128, "batch_size": 2})
    job = client.post("/jobs", json=spec)
    assert job.status_code == 201, job.text
    stored = client.get(f"/jobs/{job.json()['id']}").json()["spec"]
    assert stored["recipe"] == "lit-llama-alpaca"
    assert stored["adapter"]["target_modules"] == ["q_proj", "v_proj"]
    assert (stored["training"]["batch_size"], stored["training"]["epochs"]) == (2, 5.0)


def test_unknown_recipe_is_refused_with_its_location(client: TestClient, dataset_id: str) -> None:
    response = client.post("/jobs", json=spec_of(dataset_id, recipe="fastest"))
    assert response.status_code == 422
    assert response.json()["error"]["location"] == "/recipe"
