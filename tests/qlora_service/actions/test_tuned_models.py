from pathlib import Path

import pytest

from qlora_service.actions.service import Service
from qlora_service.domain.jobs import Job
from qlora_service.domain.tuned_models import tuned_model_name
from qlora_service.errors import Conflict, NotFound


def test_deleted_model_is_not_found_and_its_artifacts_name_the_time(
    service: Service, published: Job, tmp_path: Path
) -> None:
    name = tuned_model_name(published)
    assert name is not None
    assert service.tuned_models.list_models(limit=9) == [service.tuned_models.get(name)] == [published]
    with pytest.raises(NotFound):
        service.within("other").tuned_models.delete(name)
    withdrawn = service.tuned_models.delete(name)
    assert withdrawn.withdrawn_at is not None
    assert not list((tmp_path / "artifacts" / "jobs").rglob("*.*"))
    for action in (service.tuned_models.get, service.tuned_models.delete):
        with pytest.raises(NotFound, match="no model"):
            action(name)
    with pytest.raises(Conflict, match=f"was deleted at {withdrawn.withdrawn_at:%Y-%m-%d}"):
        service.artifacts.list_files(published.id)


def test_similar_name_does_not_delete_the_model(service: Service, published: Job) -> None:
    name = tuned_model_name(published)
    assert name is not None
    for similar in (name.replace("ft:tiny", "ft:tony"), f"{name} ", name[3:], "tiny", published.id):
        with pytest.raises(NotFound):
            service.tuned_models.delete(similar)
    assert service.artifacts.list_files(published.id)
