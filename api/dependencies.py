"""What the routes share: the caller's project of the service, and the upload directory that the lifespan opened."""

from __future__ import annotations

from typing import Annotated

from fastapi import Depends, Path, Query
from starlette.requests import Request

from api.access.auth import CallerOf
from api.http.uploads import Uploads
from qlora_service.actions.keys import Access
from qlora_service.actions.service import Service


async def _service(request: Request, caller: CallerOf) -> Service:
    service: Service = request.app.state.service
    return service.within(caller.project)


async def _access(request: Request) -> Access:
    access: Access = request.app.state.access
    return access


async def _uploads(request: Request) -> Uploads:
    uploads: Uploads = request.app.state.uploads
    return uploads


ServiceOf = Annotated[Service, Depends(_service)]
AccessOf = Annotated[Access, Depends(_access)]
UploadsOf = Annotated[Uploads, Depends(_uploads)]

JobId = Annotated[str, Path(description="A job's id.", examples=["job_019a9c2f8d31c4e55f0a7b"])]
DatasetId = Annotated[str, Path(description="A dataset's id.", examples=["ds_019a9c2f8d31c4e55f0a7b"])]
KeyId = Annotated[str, Path(description="A key's id.", examples=["key_019a9c2f8d31c4e55f0a7b"])]
After = Annotated[str | None, Query(description="The `next` of the page before.")]
Limit = Annotated[int, Query(ge=1, le=100, description="Most items of a page.")]
