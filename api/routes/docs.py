"""API documentation page, served without resources from other hosts."""

from __future__ import annotations

from pathlib import Path

from fastapi import APIRouter
from fastapi.openapi.docs import get_swagger_ui_html
from starlette.requests import Request
from starlette.responses import FileResponse, HTMLResponse

router = APIRouter(include_in_schema=False)

_WEB = Path(__file__).parents[1] / "web"
_SCRIPT, _STYLE = "swagger-ui-bundle.js", "swagger-ui.css"


@router.get("/docs")
async def docs(request: Request) -> HTMLResponse:
    """Swagger UI over /openapi.json."""
    return get_swagger_ui_html(
        openapi_url="/openapi.json",
        title=request.app.title,
        swagger_js_url=f"/docs/{_SCRIPT}",
        swagger_css_url=f"/docs/{_STYLE}",
        swagger_favicon_url="data:,",
        # Without the badge, which loads an online validator.
        swagger_ui_parameters={"validatorUrl": None},
    )


@router.get(f"/docs/{_SCRIPT}")
async def script() -> FileResponse:
    return FileResponse(_WEB / _SCRIPT, media_type="text/javascript")


@router.get(f"/docs/{_STYLE}")
async def style() -> FileResponse:
    return FileResponse(_WEB / _STYLE, media_type="text/css")
