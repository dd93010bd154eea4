"""The OpenAI-compatible API under /v1: the same actions as the native routes, in the formats of OpenAI's clients."""

from __future__ import annotations

from fastapi import APIRouter

from api.v1 import chat, files, fine_tuning, models, uploads, webhook_endpoints

router = APIRouter(prefix="/v1")
for routes in (chat, files, uploads, fine_tuning, models, webhook_endpoints):
    router.include_router(routes.router)
