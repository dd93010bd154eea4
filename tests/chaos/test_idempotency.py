from __future__ import annotations

from pathlib import Path

from qlora_service.models.catalog.catalog import Catalog
from tests.chaos.idempotency import storm


def test_a_key_makes_one_job_for_many_clients_and_an_api_that_is_killed(tiny_model: Path, tmp_path: Path) -> None:
    Catalog(tmp_path / "models").import_model("tiny", tiny_model)
    outcome = storm(tmp_path, keys=50)
    assert (outcome.wrong_keys, outcome.unequal_keys, outcome.jobs) == ([], [], 50)
    # Otherwise nothing was tested.
    assert outcome.kills >= 5
    assert outcome.replayed >= 50 * 19
    print(outcome)
