"""The HTTP application over `qlora_service.actions`."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from importlib.metadata import version

from fastapi import Depends, FastAPI

from api import v1
from api.access.auth import Authenticator, StreamGuard, authenticated, print_first_key
from api.access.origins import OriginGuard
from api.errors import install_handlers
from api.event_feed import running_feed
from api.http.idempotency import replay_response
from api.http.parameters import refuse_nul
from api.http.request_log import RequestLog
from api.http.uploads import Uploads
from api.openapi import Application
from api.routes import accuracy, artifacts, datasets, docs, events, health, jobs, keys, models, plans, recipes
from qlora_service.actions.keys import KeyRegistry
from qlora_service.actions.service import open_service
from qlora_service.models.catalog.staging import reap_stale, staging_directory
from qlora_service.settings import Settings
from qlora_service.store.database import Database
from qlora_service.store.idempotency import Replay
from qlora_service.webhooks.endpoints import open_webhooks

DESCRIPTION = """
POST a dataset and a config to `/jobs`; one GPU trains a LoRA adapter on a 4-bit base model; download the adapter files,
each with its SHA-256.

Every error response has one JSON shape: `error.code` for programs, `error.message` for people, `error.location` and
`error.findings` for the places in the request. Routes under `/v1` use OpenAI's error shape. Every response carries
`X-Request-Id`: the id that the request sent, or a generated one.

Every request needs a key, except health checks and this page: `Authorization: Bearer qk_…`. A key belongs to a project
and has no access to other projects: their objects are answered with 404. The first start prints a key; `qlora keys`
creates more.

Every POST that changes something accepts an `Idempotency-Key`: a request that is sent again with the same key, after a
lost connection or a 503, takes effect once and gets the same response.
"""
TAGS = [
    {"name": "jobs", "description": "Submit a fine-tuning job, follow it, pause, resume or cancel it."},
    {"name": "artifacts", "description": "The files that a succeeded job published."},
    {"name": "plans", "description": "Predict whether a job fits, its settings, memory and time."},
    {"name": "datasets", "description": "Upload rows, read the errors found in them, preview the rendered rows."},
    {"name": "models", "description": "The base models that jobs can name."},
    {"name": "recipes", "description": "Named sets of values that a job can start from."},
    {"name": "admin", "description": "The keys of the project. Needs a key with the scope `admin`."},
    {"name": "webhooks", "description": "Notifications when jobs end, and the log of their deliveries."},
    {"name": "openai files", "description": "For OpenAI's client: datasets, and the metrics of succeeded jobs."},
    {"name": "openai uploads", "description": "For OpenAI's client: datasets uploaded in parts."},
    {"name": "openai fine-tuning", "description": "For OpenAI's client: the same jobs as under /jobs."},
    {"name": "openai models", "description": "For OpenAI's client: base models and fine-tuned models."},
    {"name": "chat", "description": "For OpenAI's client: try a model, streamed or not; one completion at a time."},
    {"name": "health", "description": "For load balancers and containers."},
]


def create_app(settings: Settings) -> FastAPI:
    """The application; its lifespan opens the service over the data directory in `settings`."""
    app = Application(
        title="qlora-service",
        description=DESCRIPTION,
        version=version("qlora-service"),
        openapi_tags=TAGS,
        lifespan=_lifespan,
        # api.routes.docs serves /docs: the framework's pages load scripts from other hosts.
        docs_url=None,
        redoc_url=None,
    )
    app.state.settings = settings
    app.state.draining = False
    app.add_middleware(StreamGuard)
    app.add_middleware(OriginGuard, listening=settings.host, allowed=settings.allowed_host_names)
    app.add_middleware(RequestLog)  # the last one added is the outermost
    install_handlers(app)
    app.add_exception_handler(Replay, replay_response)
    for routes in (jobs, events, artifacts, plans, accuracy, datasets, models, recipes, keys, v1):
        app.include_router(routes.router, dependencies=[Depends(authenticated), Depends(refuse_nul)])
    for routes in (health, docs):  # no key needed
        app.include_router(routes.router)
    return app


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    settings: Settings = app.state.settings
    # Directories that a killed process left are unlocked; the one of this process stays locked until it exits.
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
        # On its own connections: keys are checked even while requests occupy all of the service's connections.
        registry = KeyRegistry(Database(settings.resolved_database_url))
        if settings.keys == "required":
            print_first_key(registry)
        service.uploads.reap()
        app.state.service = service
        app.state.key_registry = registry
        checked_keys = registry if settings.keys == "required" else None
        app.state.authenticator = Authenticator(checked_keys, settings.max_requests_per_minute)
        app.state.uploads = Uploads(scratch.path, settings.max_upload_bytes)
        database_url = settings.resolved_database_url
        with (
            closing(service),
            closing(registry),
            open_webhooks(database_url, private=settings.webhook_private) as app.state.webhooks,
        ):
            async with running_feed(database_url, lambda: bool(app.state.draining)) as app.state.event_feed:
                yield
