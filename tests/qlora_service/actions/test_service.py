import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qlora_service.actions.service import Service, open_service
from qlora_service.errors import Unavailable
from qlora_service.models.catalog.catalog import Catalog
from qlora_service.store.database import Database
from tests.qlora_service.actions._submissions import ROWS, submit


def test_readiness_check_leaves_no_file(service: Service, stored_state: Callable[[], Any]) -> None:
    before = stored_state()
    service.check_ready()
    assert stored_state() == before


def test_service_without_its_directory_or_tables_is_not_ready(
    service: Service, database: Database, tmp_path: Path
) -> None:
    shutil.rmtree(tmp_path / "tmp")
    with pytest.raises(Unavailable, match="disk"):
        service.check_ready()
    with database.write() as connection:
        connection.exec_driver_sql("ALTER TABLE jobs RENAME TO gone")
    with pytest.raises(Unavailable, match="database"):
        service.check_ready()


def test_service_opens_an_empty_directory_and_reopens_it(tmp_path: Path, catalog: Catalog) -> None:
    def open_directory() -> Service:
        return open_service(
            database_url=f"sqlite:///{tmp_path / 'data/state.db'}",
            artifact_url=(tmp_path / "data/artifacts").as_uri(),
            models_dir=catalog.models_dir,
            tmp_dir=tmp_path / "data/tmp",
        )

    first = open_directory()
    job = submit(first, dataset={"rows": ROWS}).job
    first.close()
    second = open_directory()
    assert second.jobs.list_jobs() == [job]
    assert [model.name for model in second.models.list()] == ["tiny"]
    assert second.models.get("tiny") == second.models.list()[0]
    second.close()
