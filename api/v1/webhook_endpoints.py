"""Where a project is told how its jobs end: OpenAI's webhook endpoints, and a log of what was delivered."""

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
EndpointId = Annotated[str, Path(description="An endpoint's id.", examples=["wh_019a9c2f8d31c4e55f0a7b"])]


@router.post("/webhook_endpoints", summary="Create a webhook endpoint", responses=openai_errors(409, 413, 415, 429))
def create_endpoint(
    asked: CreateWebhookEndpoint, webhooks: WebhooksOf, idempotency: IdempotencyOf
) -> WebhookEndpointWithSecret:
    """Have a URL told how jobs end from now on. The answer alone holds the secret that signs the messages.

    A message is a POST of `{"id": "evt_…", "object": "event", "created_at", "type", "data": {"id": "job_…"}}`, signed
    as Standard Webhooks says: `webhook-id`, `webhook-timestamp`, `webhook-signature`. What is not answered with 2xx
    within 10 seconds is sent again, under the same `webhook-id`, after 5 s, 30 s, 2 min, 10 min, 1 h, 6 h and 24 h.
    An answer of 410 disables the endpoint.
    """
    once = idempotency.once(WebhookEndpointWithSecret.of, content={"json": asked.model_dump()})
    return WebhookEndpointWithSecret.of(webhooks.create(asked.name, asked.url, asked.event_types, once=once))


@router.get("/webhook_endpoints", summary="List webhook endpoints", responses=openai_errors())
def list_endpoints(webhooks: WebhooksOf, after: After = None, limit: Limit = 20) -> ListPage[WebhookEndpoint]:
    """Your project's endpoints, newest first, without their secrets."""
    found = webhooks.list_endpoints(before=after, limit=limit + 1)
    return page_of([WebhookEndpoint.of(endpoint) for endpoint in found], limit)


@router.get("/webhook_event_types", summary="List webhook event types", responses=openai_errors())
def list_event_types() -> WebhookEventTypes:
    """What endpoints can be told."""
    return WebhookEventTypes(data=list(EVENT_TYPES.values()))


@router.get(
    "/webhook_endpoints/{webhook_endpoint_id}",
    summary="Look at a webhook endpoint",
    responses=openai_errors(404),
)
def get_endpoint(webhook_endpoint_id: EndpointId, webhooks: WebhooksOf) -> WebhookEndpoint:
    """Everything but its secret."""
    return WebhookEndpoint.of(webhooks.get(webhook_endpoint_id))


@router.post(
    "/webhook_endpoints/{webhook_endpoint_id}",
    summary="Change a webhook endpoint",
    responses=openai_errors(404, 409, 413, 415),
)
def update_endpoint(
    webhook_endpoint_id: EndpointId, asked: ChangeWebhookEndpoint, webhooks: WebhooksOf, idempotency: IdempotencyOf
) -> WebhookEndpoint:
    """What is left out stays. An endpoint that was disabled is told again."""
    once = idempotency.once(WebhookEndpoint.of, content={"json": asked.model_dump()})
    return WebhookEndpoint.of(webhooks.update(webhook_endpoint_id, **vars(asked), once=once))


@router.delete(
    "/webhook_endpoints/{webhook_endpoint_id}",
    summary="Delete a webhook endpoint",
    responses=openai_errors(404),
)
def delete_endpoint(webhook_endpoint_id: EndpointId, webhooks: WebhooksOf) -> DeletedWebhookEndpoint:
    """It is told nothing any more; the log of its deliveries goes with it."""
    webhooks.delete(webhook_endpoint_id)
    return DeletedWebhookEndpoint(id=webhook_endpoint_id)


@router.post(
    "/webhook_endpoints/{webhook_endpoint_id}/rotate_secret",
    summary="Replace a webhook endpoint's secret",
    responses=openai_errors(404, 409, 413, 415),
)
def rotate_secret(
    webhook_endpoint_id: EndpointId, asked: RotateSecret, webhooks: WebhooksOf, idempotency: IdempotencyOf
) -> WebhookEndpointWithSecret:
    """A new secret, which signs every message from now on, also those that are sent again.

    With `keep_old_secret_active_for_24_hours`, `webhook-signature` holds two signatures for a day, the new secret's and
    the old one's, with a blank between them.
    """
    once = idempotency.once(WebhookEndpointWithSecret.of, content={"json": asked.model_dump()})
    keep_old = asked.keep_old_secret_active_for_24_hours
    return WebhookEndpointWithSecret.of(webhooks.rotate_secret(webhook_endpoint_id, keep_old=keep_old, once=once))


@router.post(
    "/webhook_endpoints/{webhook_endpoint_id}/test",
    summary="Send a webhook endpoint a sample event",
    responses=openai_errors(404, 409, 413, 415),
)
def send_test(
    webhook_endpoint_id: EndpointId, asked: SendTest, webhooks: WebhooksOf, idempotency: IdempotencyOf
) -> WebhookTest:
    """A signed message about a job that does not exist, sent at once and only once; what the endpoint answered.

    Where there was no answer, the error says why; the endpoint's deliveries list it too.
    """
    once = idempotency.once(WebhookTest.of, content={"json": asked.model_dump()})
    return WebhookTest.of(webhooks.test(webhook_endpoint_id, asked.event_type, once=once))


@router.get(
    "/webhook_endpoints/{webhook_endpoint_id}/deliveries",
    summary="List what a webhook endpoint was told",
    responses=openai_errors(404),
)
def list_deliveries(
    webhook_endpoint_id: EndpointId, webhooks: WebhooksOf, after: After = None, limit: Limit = 20
) -> ListPage[WebhookDelivery]:
    """Every event, newest first: how often it was sent, what the endpoint answered, when it is sent again."""
    found = webhooks.deliveries(webhook_endpoint_id, before=after, limit=limit + 1)
    return page_of([WebhookDelivery.of(delivery) for delivery in found], limit)
