"""Request and response models of webhook endpoints and deliveries, in OpenAI's format."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, StrictBool, StringConstraints

from api.v1.rendering import seconds
from api.v1.requests import StrictModel
from api.v1.schemas import Identified
from qlora_service.domain.webhooks import EVENT_TYPES, Delivery, Endpoint
from qlora_service.webhooks.targets import MAX_URL_CHARS

_EVENT_TYPE_NAMES = ", ".join(EVENT_TYPES.values())

Text = Annotated[str, StringConstraints(strict=True, min_length=1, max_length=MAX_URL_CHARS)]


class WebhookEndpoint(Identified):
    """A URL that is notified when jobs of the project end."""

    id: str = Field(examples=["wh_019a9c2f8d31c4e55f0a7b"])
    object: Literal["webhook_endpoint"] = "webhook_endpoint"
    created_at: int = Field(description="Unix time in seconds.")
    name: str
    url: str = Field(examples=["https://example.com/told"])
    event_types: list[str]
    signing_secret_hint: str = Field(description="The last characters of the secret.", examples=["whsec_…kQ8="])
    disabled_at: int | None = Field(
        description="When the endpoint answered 410 Gone. It is not notified until it is changed. Null while enabled."
    )

    @classmethod
    def of(cls, endpoint: Endpoint) -> WebhookEndpoint:
        return cls.model_validate(_endpoint_fields(endpoint))


class WebhookEndpointWithSecret(WebhookEndpoint):
    """An endpoint with the secret that signs its messages. Store the secret: it is not shown again."""

    signing_secret: str = Field(examples=["whsec_C2FVsBQIhrscChlQIMV+b5sSYspob7oD"])

    @classmethod
    def of(cls, endpoint: Endpoint) -> WebhookEndpointWithSecret:
        return cls.model_validate(_endpoint_fields(endpoint) | {"signing_secret": endpoint.secret})


class DeletedWebhookEndpoint(Identified):
    id: str
    object: Literal["webhook_endpoint.deleted"] = "webhook_endpoint.deleted"
    deleted: bool = True


class WebhookTest(BaseModel):
    """The endpoint's response to a sample event."""

    object: Literal["webhook_endpoint.test"] = "webhook_endpoint.test"
    webhook_endpoint_id: str
    event_type: str
    status_code: int = Field(description="The HTTP status of the endpoint's response.")
    success: Literal[True] = Field(True, description="Whether the endpoint responded at all.")

    @classmethod
    def of(cls, delivery: Delivery) -> WebhookTest:
        assert delivery.last_status is not None
        return cls(webhook_endpoint_id=delivery.endpoint_id, event_type=delivery.type, status_code=delivery.last_status)


class WebhookDelivery(Identified):
    """One event for one endpoint, and the state of its delivery."""

    id: str = Field(examples=["whd_019a9c2f8d31c4e55f0a7b"])
    object: Literal["webhook_endpoint.delivery"] = "webhook_endpoint.delivery"
    event_id: str = Field(description="The header `webhook-id` of every attempt, and the body's `id`.")
    type: str = Field(examples=["fine_tuning.job.succeeded"])
    data: dict[str, Any] = Field(examples=[{"id": "job_019a9c2f8d31c4e55f0a7b"}])
    created_at: int
    status: Literal["pending", "delivered", "failed"] = Field(
        description="`failed`: no more attempts, after 8 of them or because the endpoint was disabled."
    )
    attempts: int
    next_attempt_at: int | None
    delivered_at: int | None
    last_status: int | None = Field(description="The HTTP status of the response to the latest attempt.")
    last_error: str | None = Field(description="Why the latest attempt got no response.")

    @classmethod
    def of(cls, delivery: Delivery) -> WebhookDelivery:
        pending = "failed" if delivery.due_at is None else "pending"
        return cls(
            id=delivery.id,
            event_id=delivery.event_id,
            type=delivery.type,
            data=delivery.body["data"],
            created_at=seconds(delivery.created_at),
            status="delivered" if delivery.delivered_at else pending,
            attempts=delivery.attempts,
            next_attempt_at=_seconds_or_none(delivery.due_at),
            delivered_at=_seconds_or_none(delivery.delivered_at),
            last_status=delivery.last_status,
            last_error=delivery.last_error,
        )


class WebhookEventTypes(BaseModel):
    object: Literal["list"] = "list"
    data: list[str]


class CreateWebhookEndpoint(StrictModel):
    name: Text = Field(description="A display name of 1 to 64 characters.", examples=["done"])
    url: Text = Field(
        description="An https URL on the public internet. Redirects are not followed.",
        examples=["https://example.com/told"],
    )
    event_types: list[Text] = Field(
        description=f"One or more of {_EVENT_TYPE_NAMES}.", examples=[list(EVENT_TYPES.values())]
    )


class ChangeWebhookEndpoint(StrictModel):
    name: Text | None = Field(None, examples=["done"])
    url: Text | None = Field(None, examples=["https://example.com/elsewhere"])
    event_types: list[Text] | None = Field(None, examples=[["fine_tuning.job.failed"]])


class RotateSecret(StrictModel):
    keep_old_secret_active_for_24_hours: StrictBool = Field(
        False,
        description="Sign every message with both secrets for a day, so that the receiver can switch at any time of "
        "that day. Without it, a message that a receiver with the old secret refuses is retried.",
    )


class SendTest(StrictModel):
    event_type: Text = Field(description=f"One of {_EVENT_TYPE_NAMES}.", examples=["fine_tuning.job.succeeded"])


def _endpoint_fields(endpoint: Endpoint) -> dict[str, Any]:
    return {
        "id": endpoint.id,
        "created_at": seconds(endpoint.created_at),
        "name": endpoint.name,
        "url": endpoint.url,
        "event_types": endpoint.event_types,
        "signing_secret_hint": f"whsec_…{endpoint.secret[-4:]}",
        "disabled_at": _seconds_or_none(endpoint.disabled_at),
    }


def _seconds_or_none(at: datetime | None) -> int | None:
    return None if at is None else seconds(at)
