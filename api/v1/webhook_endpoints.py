"""Webhook endpoints in OpenAI's format: management, test events, secret rotation, and the delivery log."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends, Path
from starlette.requests import Request

from api.dependencies import Limit, ServiceOf
from api.http.idempotency import IdempotencyOf
from api.v1.routes import After, JsonRoute, openai_errors
from api.v1.schemas import ListPage, page_of
from api.v1.webhook_schemas import (
    ChangeWebhookEndpoint,
    CreateWebhookEndpoint,
    DeletedWebhookEndpoint,
    RotateSecret,
    SendTest,
    WebhookDelivery,
    WebhookEndpoint,
    WebhookEndpointWithSecret,
    WebhookEventTypes,
    WebhookTest,
)
from qlora_service.domain.webhooks import EVENT_TYPES
from qlora_service.webhooks.endpoints import Webhooks

router = APIRouter(tags=["webhooks"], route_class=JsonRoute)


async def _webhooks(request: Request, service: ServiceOf) -> Webhooks:
    webhooks: Webhooks = request.app.state.webhooks
    return webhooks.within(service.project)


WebhooksOf = Annotated[Webhooks, Depends(_webhooks)]
EndpointId = Annotated[str, Path(description="The id of a webhook endpoint.", examples=["wh_019a9c2f8d31c4e55f0a7b"])]


@router.post("/webhook_endpoints", summary="Create a webhook endpoint", responses=openai_errors(409, 413, 415, 429))
def create_endpoint(
    body: CreateWebhookEndpoint, webhooks: WebhooksOf, idempotency: IdempotencyOf
) -> WebhookEndpointWithSecret:
    """Notify a URL when jobs of the project end. Only this response contains the secret that signs the messages.

    A message is a POST of `{"id": "evt_…", "object": "event", "created_at", "type", "data": {"id": "job_…"}}`, signed
    according to Standard Webhooks with the headers `webhook-id`, `webhook-timestamp` and `webhook-signature`. A
    delivery without a 2xx response within 10 seconds is retried under the same `webhook-id` after 5 s, 30 s, 2 min,
    10 min, 1 h, 6 h and 24 h. A response of 410 disables the endpoint.
    """
    once = idempotency.once(WebhookEndpointWithSecret.of, content={"json": body.model_dump()})
    return WebhookEndpointWithSecret.of(webhooks.create(body.name, body.url, body.event_types, once=once))


@router.get("/webhook_endpoints", summary="List webhook endpoints", responses=openai_errors())
def list_endpoints(webhooks: WebhooksOf, after: After = None, limit: Limit = 20) -> ListPage[WebhookEndpoint]:
    """The project's endpoints, newest first, without their secrets."""
    endpoints = webhooks.list_endpoints(before=after, limit=limit + 1)
    return page_of([WebhookEndpoint.of(endpoint) for endpoint in endpoints], limit)


@router.get("/webhook_event_types", summary="List webhook event types", responses=openai_errors())
def list_event_types() -> WebhookEventTypes:
    """The event types that an endpoint can subscribe to."""
    return WebhookEventTypes(data=list(EVENT_TYPES.values()))


@router.get(
    "/webhook_endpoints/{webhook_endpoint_id}",
    summary="Look at a webhook endpoint",
    responses=openai_errors(404),
)
def get_endpoint(webhook_endpoint_id: EndpointId, webhooks: WebhooksOf) -> WebhookEndpoint:
    """The endpoint, without its secret."""
    return WebhookEndpoint.of(webhooks.get(webhook_endpoint_id))


@router.post(
    "/webhook_endpoints/{webhook_endpoint_id}",
    summary="Change a webhook endpoint",
    responses=openai_errors(404, 409, 413, 415),
)
def update_endpoint(
    webhook_endpoint_id: EndpointId, body: ChangeWebhookEndpoint, webhooks: WebhooksOf, idempotency: IdempotencyOf
) -> WebhookEndpoint:
    """Change the given fields. This also enables a disabled endpoint again."""
    once = idempotency.once(WebhookEndpoint.of, content={"json": body.model_dump()})
    return WebhookEndpoint.of(webhooks.update(webhook_endpoint_id, **vars(body), once=once))


@router.delete(
    "/webhook_endpoints/{webhook_endpoint_id}",
    summary="Delete a webhook endpoint",
    responses=openai_errors(404),
)
def delete_endpoint(webhook_endpoint_id: EndpointId, webhooks: WebhooksOf) -> DeletedWebhookEndpoint:
    """Stop notifying the endpoint, and delete it with its delivery log."""
    webhooks.delete(webhook_endpoint_id)
    return DeletedWebhookEndpoint(id=webhook_endpoint_id)


@router.post(
    "/webhook_endpoints/{webhook_endpoint_id}/rotate_secret",
    summary="Replace a webhook endpoint's secret",
    responses=openai_errors(404, 409, 413, 415),
)
def rotate_secret(
    webhook_endpoint_id: EndpointId, body: RotateSecret, webhooks: WebhooksOf, idempotency: IdempotencyOf
) -> WebhookEndpointWithSecret:
    """Replace the secret. The new one signs every message from now on, retries included.

    With `keep_old_secret_active_for_24_hours`, `webhook-signature` contains two signatures for a day, separated by a
    space: that of the new secret and that of the old one.
    """
    once = idempotency.once(WebhookEndpointWithSecret.of, content={"json": body.model_dump()})
    keep_old = body.keep_old_secret_active_for_24_hours
    return WebhookEndpointWithSecret.of(webhooks.rotate_secret(webhook_endpoint_id, keep_old=keep_old, once=once))


@router.post(
    "/webhook_endpoints/{webhook_endpoint_id}/test",
    summary="Send a webhook endpoint a sample event",
    responses=openai_errors(404, 409, 413, 415),
)
def send_test(
    webhook_endpoint_id: EndpointId, body: SendTest, webhooks: WebhooksOf, idempotency: IdempotencyOf
) -> WebhookTest:
    """Send one signed message about a job that does not exist, without retries, and return the endpoint's status.

    Without a response from the endpoint, the error states the reason. The delivery log lists the message too.
    """
    once = idempotency.once(WebhookTest.of, content={"json": body.model_dump()})
    return WebhookTest.of(webhooks.test(webhook_endpoint_id, body.event_type, once=once))


@router.get(
    "/webhook_endpoints/{webhook_endpoint_id}/deliveries",
    summary="List what a webhook endpoint was told",
    responses=openai_errors(404),
)
def list_deliveries(
    webhook_endpoint_id: EndpointId, webhooks: WebhooksOf, after: After = None, limit: Limit = 20
) -> ListPage[WebhookDelivery]:
    """The delivery log, newest first: attempts, the last status or error, and the time of the next attempt."""
    deliveries = webhooks.deliveries(webhook_endpoint_id, before=after, limit=limit + 1)
    return page_of([WebhookDelivery.of(delivery) for delivery in deliveries], limit)
