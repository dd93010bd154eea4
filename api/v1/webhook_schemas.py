"""Webhook endpoints and deliveries as OpenAI's clients expect them."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, StrictBool, StringConstraints

from api.v1.requests import Part
from api.v1.schemas import Identified
from qlora_service.domain.webhooks import EVENT_TYPES, Delivery, Endpoint
from qlora_service.webhooks.targets import MAX_URL_CHARS

_TYPES = ", ".join(EVENT_TYPES.values())

Text = Annotated[str, StringConstraints(strict=True, min_length=1, max_length=MAX_URL_CHARS)]


class WebhookEndpoint(Identified):
    """Where your project is told how its jobs end."""

    id: str = Field(examples=["wh_019a9c2f8d31c4e55f0a7b"])
    object: Literal["webhook_endpoint"] = "webhook_endpoint"
    created_at: int = Field(description="Seconds since 1970.")
    name: str
    url: str = Field(examples=["https://example.com/told"])
    event_types: list[str]
    signing_secret_hint: str = Field(description="The secret's last characters.", examples=["whsec_…kQ8="])
    disabled_at: int | None = Field(
        description="When it answered 410 Gone: it is told nothing until it is changed. Null while it is told."
    )

    @classmethod
    def of(cls, endpoint: Endpoint) -> WebhookEndpoint:
        return cls.model_validate(_endpoint_fields(endpoint))


class WebhookEndpointWithSecret(WebhookEndpoint):
    """An endpoint and what signs its messages: keep it, it is not shown again."""

    signing_secret: str = Field(examples=["whsec_C2FVsBQIhrscChlQIMV+b5sSYspob7oD"])

    @classmethod
    def of(cls, endpoint: Endpoint) -> WebhookEndpointWithSecret:
        return cls.model_validate(_endpoint_fields(endpoint) | {"signing_secret": endpoint.secret})


class DeletedWebhookEndpoint(Identified):
    id: str
    object: Literal["webhook_endpoint.deleted"] = "webhook_endpoint.deleted"
    deleted: bool = True


class WebhookTest(BaseModel):
    """How the endpoint took a sample event."""

    object: Literal["webhook_endpoint.test"] = "webhook_endpoint.test"
    webhook_endpoint_id: str
    event_type: str
    status_code: int = Field(description="What the endpoint answered.")
    success: Literal[True] = Field(True, description="That it answered at all.")

    @classmethod
    def of(cls, delivery: Delivery) -> WebhookTest:
        assert delivery.last_status is not None
        return cls(webhook_endpoint_id=delivery.endpoint_id, event_type=delivery.type, status_code=delivery.last_status)


class WebhookDelivery(Identified):
    """One event for one endpoint, and how far it got."""

    id: str = Field(examples=["whd_019a9c2f8d31c4e55f0a7b"])
    object: Literal["webhook_endpoint.delivery"] = "webhook_endpoint.delivery"
    event_id: str = Field(description="The header `webhook-id` of every attempt, and the body's `id`.")
    type: str = Field(examples=["fine_tuning.job.succeeded"])
    data: dict[str, Any] = Field(examples=[{"id": "job_019a9c2f8d31c4e55f0a7b"}])
    created_at: int
    status: Literal["pending", "delivered", "failed"] = Field(
        description="`failed` is given up, after 8 attempts or because the endpoint was disabled."
    )
    attempts: int
    next_attempt_at: int | None
    delivered_at: int | None
    last_status: int | None = Field(description="What the endpoint answered to the latest attempt.")
    last_error: str | None = Field(description="Why there was no answer to it.")

    @classmethod
    def of(cls, delivery: Delivery) -> WebhookDelivery:
        pending = "failed" if delivery.due_at is None else "pending"
        return cls(
            id=delivery.id,
            event_id=delivery.event_id,
            type=delivery.type,
            data=delivery.body["data"],
            created_at=_seconds(delivery.created_at),
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


class CreateWebhookEndpoint(Part):
    name: Text = Field(description="1 to 64 characters, for people.", examples=["done"])
    url: Text = Field(
        description="https, and on the public internet. Redirects are not followed.",
        examples=["https://example.com/told"],
    )
    event_types: list[Text] = Field(description=f"Some of {_TYPES}.", examples=[list(EVENT_TYPES.values())])


class ChangeWebhookEndpoint(Part):
    name: Text | None = Field(None, examples=["done"])
    url: Text | None = Field(None, examples=["https://example.com/elsewhere"])
    event_types: list[Text] | None = Field(None, examples=[["fine_tuning.job.failed"]])


class RotateSecret(Part):
    keep_old_secret_active_for_24_hours: StrictBool = Field(
        False,
        description="Whether every message is signed with both for a day, so that a receiver may change over at any "
        "time of it. Without it, what a receiver refuses while it still has the old secret is sent again.",
    )


class SendTest(Part):
    event_type: Text = Field(description=f"One of {_TYPES}.", examples=["fine_tuning.job.succeeded"])


def _endpoint_fields(endpoint: Endpoint) -> dict[str, Any]:
    return {
        "id": endpoint.id,
        "created_at": _seconds(endpoint.created_at),
        "name": endpoint.name,
        "url": endpoint.url,
        "event_types": endpoint.event_types,
        "signing_secret_hint": f"whsec_…{endpoint.secret[-4:]}",
        "disabled_at": _seconds_or_none(endpoint.disabled_at),
    }


def _seconds(at: datetime) -> int:
    return int(at.timestamp())


def _seconds_or_none(at: datetime | None) -> int | None:
    return None if at is None else _seconds(at)
