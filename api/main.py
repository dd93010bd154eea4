"""The HTTP application over `qlora_service.actions.jobs`."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from importlib.metadata import version

from fastapi import Depends, FastAPI

from api import v1
from api.access.auth import Gate, StreamGuard, authenticated, hand_over_first_key
from api.access.origins import OriginGuard
from api.errors import install_handlers
from api.event_feed import running_feed
from api.http.idempotency import answer_again
from api.http.parameters import refuse_nul
from api.http.request_log import RequestLog
from api.http.uploads import Uploads
from api.openapi import Application
from api.routes import accuracy, artifacts, datasets, docs, events, health, jobs, keys, models, plans, recipes
from qlora_service.actions.keys import Access
from qlora_service.actions.service import open_service
from qlora_service.models.catalog.staging import reap_stale, staging_directory
from qlora_service.settings import Settings
from qlora_service.store.database import Database
from qlora_service.store.idempotency import Replay
from qlora_service.webhooks.endpoints import open_webhooks

DESCRIPTION = """
POST a dataset and a config to `/jobs`; one GPU trains a LoRA adapter over a 4-bit base model; download adapter
files you can trust.

Every error, of every route, is one JSON shape: `error.code` for programs, `error.message` for people,
`error.location` and `error.findings` for the places. Every answer carries `X-Request-Id`, the request's own if it
sent one.

Every request but those for health and this page names its key: `Authorization: Bearer qk_…`. A key belongs to a
project; what other projects have is not there for it. The first start prints a key; `qlora keys` makes more.

Every POST that changes something takes an `Idempotency-Key`: sent again after a lost connection or a 503 under the same
key, it takes effect once and is answered the same.
"""
TAGS = [
    {"name": "jobs", "description": "Submit a fine-tuning job, follow it, pause, resume or cancel it."},
    {"name": "artifacts", "description": "What a succeeded job published."},
    {"name": "plans", "description": "Will it fit, and how would it run?"},
    {"name": "datasets", "description": "Upload rows, see what is wrong with them and how they will be trained."},
    {"name": "models", "description": "The base models that jobs can name."},
    {"name": "recipes", "description": "Named settings that a job can start from."},
    {"name": "admin", "description": "The keys of the project. Needs a key of the scope `admin`."},
    {"name": "webhooks", "description": "Be told how jobs end, and see what was delivered."},
    {"name": "openai files", "description": "For OpenAI's client: datasets, and the metrics of succeeded jobs."},
    {"name": "openai uploads", "description": "For OpenAI's client: datasets that arrive in parts."},
    {"name": "openai fine-tuning", "description": "For OpenAI's client: the same jobs as under /jobs."},
    {"name": "openai models", "description": "For OpenAI's client: base models and fine-tuned ones."},
    {"name": "chat", "description": "For OpenAI's client: try a model, streamed or not; one answer at a time."},
    {"name": "health", "description": "For load balancers and containers."},
]


def create_app(settings: Settings) -> FastAPI:
    """The application; its lifespan opens the service over the data directory of `settings`."""
    app = Application(
        title="qlora-service",
        description=DESCRIPTION,
        version=version("qlora-service"),
        openapi_tags=TAGS,
        lifespan=_lifespan,
        # api.routes.docs serves /docs: the framework's pages come with scripts of other hosts.
        docs_url=None,
        redoc_url=None,
    )
    app.state.settings = settings
    app.state.draining = False
    app.add_middleware(StreamGuard)
    app.add_middleware(OriginGuard, listening=settings.host, allowed=settings.allowed_host_names)
    app.add_middleware(RequestLog)  # the last one added is the outermost
    install_handlers(app)
    app.add_exception_handler(Replay, answer_again)
    for routes in (jobs, events, artifacts, plans, accuracy, datasets, models, recipes, keys, v1):
        app.include_router(routes.router, dependencies=[Depends(authenticated), Depends(refuse_nul)])
    for routes in (health, docs):  # open to everybody
        app.include_router(routes.router)
    return app


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    settings: Settings = app.state.settings
    # What a killed process left lies in unlocked directories; ours is locked until we die.
    reap_stale(settings.tmp_dir)
    with staging_directory(settings.tmp_dir) as scratch:
        service = open_service(
            database_url=settings.resolved_database_url,
            artifact_url=settings.resolved_artifact_url,
            models_dir=settings.models_dir,
            tmp_dir=scratch.path,
            max_queued_jobs=settings.max_queued_jobs,
            max_stored_bytes=settings.max_stored_bytes,
            plan_device=settings.plan_device,
            plan_cache_dir=settings.plan_cache_dir,
        )
        # With connections of its own: those who may ask are told so also while others wait for the rest.
        access = Access(Database(settings.resolved_database_url))
        if settings.keys == "required":
            hand_over_first_key(access)
        service.uploads.reap()
        app.state.service = service
        app.state.access = access
        app.state.gate = Gate(access if settings.keys == "required" else None, settings.max_requests_per_minute)
        app.state.uploads = Uploads(scratch.path, settings.max_upload_bytes)
        database_url = settings.resolved_database_url
        with (
            closing(service),
            closing(access),
            open_webhooks(database_url, private=settings.webhook_private) as app.state.webhooks,
        ):
            async with running_feed(database_url, lambda: bool(app.state.draining)) as app.state.event_feed:
                yield
