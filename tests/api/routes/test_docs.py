from __future__ import annotations

import re

from fastapi.testclient import TestClient

from tests.api.conftest import ROOT, sha256

WEB = ROOT / "api" / "web"


def test_docs_page_loads_nothing_from_other_hosts(bare_client: TestClient) -> None:
    page = bare_client.get("/docs").text
    assert "/openapi.json" in page
    assert "http" not in page
    links = re.findall(r'(?:src|href)="([^"]+)"', page)
    assert links == ["/docs/swagger-ui.css", "data:,", "/docs/swagger-ui-bundle.js"]


def test_script_and_style_are_served_with_their_media_types(bare_client: TestClient) -> None:
    script = bare_client.get("/docs/swagger-ui-bundle.js")
    assert script.headers["Content-Type"].startswith("text/javascript")
    assert "SwaggerUIBundle" in script.text
    style = bare_client.get("/docs/swagger-ui.css")
    assert style.headers["Content-Type"].startswith("text/css")
    assert ".swagger-ui" in style.text


def test_files_match_the_checksums_in_the_notice() -> None:
    entries = re.findall(r"^([0-9a-f]{64})  (\S+)$", (WEB / "NOTICE").read_text(), flags=re.MULTILINE)
    assert {name for _, name in entries} == {"swagger-ui-bundle.js", "swagger-ui.css"}
    for digest, name in entries:
        assert sha256((WEB / name).read_bytes()) == digest
