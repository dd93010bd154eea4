"""How near plans came to what jobs took."""

from __future__ import annotations

from fastapi import APIRouter

from api.dependencies import ServiceOf
from api.errors import error_responses
from api.schemas import DeviceAccuracy, Listing

router = APIRouter(prefix="/plans", tags=["plans"])


@router.get("/accuracy", summary="Predicted against actual", responses=error_responses(422))
def plan_accuracy(service: ServiceOf) -> Listing[DeviceAccuracy]:
    """By device: how the memory and time that finished jobs took compare with what was predicted for them.

    Figures are actual over predicted. Jobs of every project count, since they share the machine; none is named.
    """
    return Listing(data=[DeviceAccuracy.model_validate(accuracy) for accuracy in service.plans.accuracy()])
