"""Health checks: liveness and readiness."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.requests import Request

from api.errors import error_responses
from api.schemas import Health
from qlora_service.actions.service import Service
from qlora_service.errors import Unavailable

router = APIRouter(tags=["health"])


@router.get("/healthz", summary="Is the process up", responses=error_responses(guarded=False))
async def healthz() -> Health:
    """Liveness: succeeds while the process responds. Restart the process if this fails."""
    return Health()


@router.get("/readyz", summary="Can it take a job", responses=error_responses(guarded=False))
def readyz(request: Request) -> Health:
    """Readiness: the database answers and the data disk is writable. Send no requests while this fails."""
    if request.app.state.draining:
        raise Unavailable("the service is stopping")
    service: Service = request.app.state.service
    service.check_ready()
    return Health()
