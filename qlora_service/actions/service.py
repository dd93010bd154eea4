"""The actions of one project, by subject. The API and the tests call these."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from sqlalchemy.exc import SQLAlchemyError

from qlora_service.actions.artifacts import Artifacts
from qlora_service.actions.dataset_storage import DatasetStorage
from qlora_service.actions.datasets import Datasets
from qlora_service.actions.jobs import Jobs
from qlora_service.actions.plans import Plans
from qlora_service.actions.rendering import Rendering
from qlora_service.actions.tuned_models import TunedModels
from qlora_service.actions.uploads import Uploads
from qlora_service.artifacts.store import ArtifactStore
from qlora_service.domain.clock import Clock, utc_now
from qlora_service.domain.keys import LOCAL_PROJECT
from qlora_service.errors import Unavailable
from qlora_service.models.catalog.catalog import Catalog
from qlora_service.planning.planner import AUTO, Planner
from qlora_service.store.database import Database


@dataclass(frozen=True)
class Stores:
    """What the actions of every project work on, and the limits of each project."""

    database: Database
    artifacts: ArtifactStore
    catalog: Catalog
    tmp_dir: Path
    planner: Planner = field(default_factory=Planner)
    clock: Clock = utc_now
    max_queued_jobs: int | None = None
    """Jobs of one project in the queue"""
    max_stored_bytes: int | None = None
    """Bytes of one project's datasets, uploads and adapters"""

    def __post_init__(self) -> None:
        self.tmp_dir.mkdir(parents=True, exist_ok=True)


@dataclass(frozen=True)
class Service:
    """The actions of one project; safe to share between threads.

    Objects of other projects do not exist here: they raise NotFound and are in no list.

    Actions that change something take a `once`: under its idempotency key the action takes effect one time. A request
    that was answered before raises `store.idempotency.Replay`; another request under the same key raises Conflict.
    """

    project: str
    jobs: Jobs
    artifacts: Artifacts
    datasets: Datasets
    uploads: Uploads
    plans: Plans
    tuned_models: TunedModels
    models: Catalog
    stores: Stores

    @classmethod
    def of(cls, stores: Stores, project: str = LOCAL_PROJECT) -> Service:
        """The actions of `project` on the stores."""
        database, catalog, clock = stores.database, stores.catalog, stores.clock
        storage = DatasetStorage(
            database, stores.artifacts, stores.tmp_dir, project, clock, max_stored_bytes=stores.max_stored_bytes
        )
        rendering = Rendering(database, storage, clock)
        plans = Plans(database, catalog, stores.planner, storage, rendering, clock)
        return cls(
            project=project,
            jobs=Jobs(
                database,
                catalog,
                storage,
                rendering,
                plans,
                project,
                clock,
                max_queued_jobs=stores.max_queued_jobs,
            ),
            artifacts=Artifacts(database, stores.artifacts, project),
            datasets=Datasets(database, stores.artifacts, catalog, storage, rendering, project, clock),
            uploads=Uploads(database, stores.artifacts, storage, project, clock),
            plans=plans,
            tuned_models=TunedModels(database, stores.artifacts, project, clock),
            models=catalog,
            stores=stores,
        )

    def within(self, project: str) -> Service:
        """The same service for another project."""
        return Service.of(self.stores, project)

    def check_ready(self) -> None:
        """Returns when a job could be accepted: the database answers, and scratch files can be written.

        Raises:
            Unavailable: with the reason.
        """
        try:
            self.jobs.list_jobs(limit=1)
            with tempfile.TemporaryFile(dir=self.stores.tmp_dir) as file:
                file.write(b"\0")
        except SQLAlchemyError as error:
            raise Unavailable(f"the database does not answer ({type(error).__name__}): check it, then retry") from error
        except OSError as error:
            raise Unavailable(f"the data disk cannot be written ({error.strerror}): check it, then retry") from error

    def close(self) -> None:
        """Close the database's connections."""
        self.stores.database.close()


def open_service(
    *,
    database_url: str,
    artifact_url: str,
    models_dir: Path,
    tmp_dir: Path,
    max_queued_jobs: int | None = None,
    max_stored_bytes: int | None = None,
    plan_device: str = AUTO,
    plan_cache_dir: Path | None = None,
) -> Service:
    """The service of the project `local`; the database's schema is migrated to the newest.

    Raises:
        InvalidRequest: `plan_device` names no known device.
    """
    database = Database(database_url)
    database.migrate()
    stores = Stores(
        database=database,
        artifacts=ArtifactStore(artifact_url),
        catalog=Catalog(models_dir),
        planner=Planner(plan_device, plan_cache_dir),
        tmp_dir=tmp_dir,
        max_queued_jobs=max_queued_jobs,
        max_stored_bytes=max_stored_bytes,
    )
    return Service.of(stores)
