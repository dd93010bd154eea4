"""Dependencies shared by the routes: the service within the caller's project, keys, uploads, common parameters."""

from __future__ import annotations

from typing import Annotated

from fastapi import Depends, Path, Query
from starlette.requests import Request

from api.access.auth import CallerOf
from api.http.uploads import Uploads
from qlora_service.actions.keys import KeyRegistry
from qlora_service.actions.service import Service


async def _service(request: Request, caller: CallerOf) -> Service:
    service: Service = request.app.state.service
    return service.within(caller.project)


async def _key_registry(request: Request) -> KeyRegistry:
    registry: KeyRegistry = request.app.state.key_registry
    return registry


async def _uploads(request: Request) -> Uploads:
    uploads: Uploads = request.app.state.uploads
    return uploads


ServiceOf = Annotated[Service, Depends(_service)]
KeyRegistryOf = Annotated[KeyRegistry, Depends(_key_registry)]
UploadsOf = Annotated[Uploads, Depends(_uploads)]

JobId = Annotated[str, Path(description="Id of a job.", examples=["job_019a9c2f8d31c4e55f0a7b"])]
DatasetId = Annotated[str, Path(description="Id of a dataset.", examples=["ds_019a9c2f8d31c4e55f0a7b"])]
KeyId = Annotated[str, Path(description="Id of a key.", examples=["key_019a9c2f8d31c4e55f0a7b"])]
After = Annotated[str | None, Query(description="Cursor: the `next` of the previous page.")]
Limit = Annotated[int, Query(ge=1, le=100, description="Maximum number of items in the page.")]
