"""Accuracy of plans: actual over predicted memory and time."""

from __future__ import annotations

from fastapi import APIRouter

from api.dependencies import ServiceOf
from api.errors import error_responses
from api.schemas import DeviceAccuracy, Listing

router = APIRouter(prefix="/plans", tags=["plans"])


@router.get("/accuracy", summary="Predicted against actual", responses=error_responses(422))
def plan_accuracy(service: ServiceOf) -> Listing[DeviceAccuracy]:
    """Actual over predicted memory and time of finished jobs, by device.

    Jobs of all projects count, because they share the machine; the response names no job and no project.
    """
    return Listing(data=[DeviceAccuracy.model_validate(accuracy) for accuracy in service.plans.accuracy()])
