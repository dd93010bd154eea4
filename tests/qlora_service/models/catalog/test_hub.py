"""Imports from a hub: the real client against a small server with the endpoints that it uses."""

import hashlib
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

from qlora_service.models.catalog.hub import parse_hub_id

COMMIT = "0123456789abcdef0123456789abcdef01234567"

# The client reads the endpoint when it is imported, so each model import runs in a new process.
PROGRAM = """
import json, sys
from pathlib import Path
from qlora_service.errors import QLoRAError
from qlora_service.models.catalog.catalog import Catalog
try:
    model = Catalog(Path(sys.argv[1])).import_model("ours", sys.argv[2])
    print(json.dumps(model.as_dict() | {"reference": model.reference}))
except QLoRAError as error:
    print(json.dumps(error.as_dict()))
"""


class Hub(ThreadingHTTPServer):
    """Serves one directory as org/tiny at the branch `main`, and refuses access to org/gated."""

    def __init__(self, directory: Path) -> None:
        super().__init__(("127.0.0.1", 0), HubHandler)
        self.directory = directory
        self.downloads: list[str] = []


class HubHandler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *arguments: object) -> None:
        """Logs nothing, to keep the test's output clean."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        if path.startswith("/org/gated/resolve/"):
            self.reply(403, {"error": "gated"}, {"X-Error-Code": "GatedRepo"})
            return
        path = path.replace("/api/models/org/gated", "/api/models/org/tiny")  # the listing of a gated model is public
        if path in ("/api/models/org/tiny", "/api/models/org/tiny/revision/main"):
            self.reply(200, {"id": "org/tiny", "sha": COMMIT, "siblings": []})
        elif path.startswith("/api/models/org/tiny/revision/"):
            self.reply(404, {"error": "no revision"}, {"X-Error-Code": "RevisionNotFound"})
        elif path == f"/api/models/org/tiny/tree/{COMMIT}":
            files = [entry for entry in sorted(self.server.directory.rglob("*")) if entry.is_file()]
            self.reply(200, [self.tree_entry(entry) for entry in files])
        elif path.startswith(f"/org/tiny/resolve/{COMMIT}/"):
            name = path.split(COMMIT + "/")[1]
            if self.command == "GET":
                self.server.downloads.append(name)
            self.reply(200, (self.server.directory / name).read_bytes())
        else:
            self.reply(404, {"error": "no repository"}, {"X-Error-Code": "RepoNotFound"})

    def tree_entry(self, path: Path) -> dict[str, Any]:
        content = path.read_bytes()
        name = path.relative_to(self.server.directory).as_posix()
        return {"type": "file", "oid": hashlib.sha1(content).hexdigest(), "size": len(content), "path": name}

    def reply(self, status: int, body: object, headers: dict[str, str] | None = None) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)


@pytest.fixture
def hub(model_directory: Path) -> Iterator[Hub]:
    with Hub(model_directory) as server:
        thread = Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def import_model(source: str, tmp_path: Path, **environment: str) -> dict[str, Any]:
    """The JSON document that the import printed: the model, or the error."""
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path / "models"), source],
        env=inherited | {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_XET": "1"} | environment,
        stdout=subprocess.PIPE,
        check=True,
        timeout=60,
    )
    document: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return document


def endpoint(hub: Hub) -> str:
    return f"http://127.0.0.1:{hub.server_port}"


def test_hub_model_is_imported_at_its_commit_without_other_formats(hub: Hub, tmp_path: Path) -> None:
    (hub.directory / "onnx").mkdir()
    for name in ["onnx/config.json", "pytorch_model.bin", "modeling.py", "consolidated.safetensors"]:
        (hub.directory / name).write_text("{}")
    (hub.directory / "additional_chat_templates").mkdir()
    (hub.directory / "additional_chat_templates/tool_use.jinja").write_text("{{ tools[0].name }}")
    model = import_model("org/tiny@main", tmp_path, HF_ENDPOINT=endpoint(hub))
    assert model.get("source") == "hub", model
    assert (model["hub_id"], model["revision"], model["reference"]) == ("org/tiny", COMMIT, "org/tiny")
    weights = "model.safetensors"
    assert (tmp_path / "models/ours" / weights).read_bytes() == (hub.directory / weights).read_bytes()
    assert not {"pytorch_model.bin", "modeling.py", "onnx/config.json"} & set(hub.downloads)
    assert "consolidated.safetensors" not in hub.downloads
    assert "{{ tools[0].name }}" in (tmp_path / "models/ours/chat_template.jinja").read_text()

    (tmp_path / "models/ours").rename(tmp_path / "first")
    again = import_model("org/tiny", tmp_path, HF_ENDPOINT=endpoint(hub), HF_HUB_OFFLINE="1")
    assert again.get("weights_sha256") == model["weights_sha256"], "cached files must not need a network"


def test_model_with_remote_code_is_refused_before_its_weights_are_fetched(hub: Hub, tmp_path: Path) -> None:
    config = json.loads((hub.directory / "config.json").read_bytes())
    (hub.directory / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoModel": "m.M"}}))
    error = import_model("org/tiny", tmp_path, HF_ENDPOINT=endpoint(hub))
    assert error["code"] == "invalid_model"
    assert "/auto_map" in error["message"]
    assert "config.json" in hub.downloads
    assert "model.safetensors" not in hub.downloads


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("org/unknown", "neither a local path nor a model on the hub"),
        ("org/tiny@v9", "org/tiny has no revision v9"),
        ("org/gated", "is gated: accept its terms"),
        ("org/tiny.", "neither a local path nor a hub id"),
    ],
)
def test_model_that_the_hub_does_not_serve_is_invalid(hub: Hub, tmp_path: Path, source: str, words: str) -> None:
    error = import_model(source, tmp_path, HF_ENDPOINT=endpoint(hub))
    assert error["code"] == "invalid_model"
    assert words in error["message"]
    assert list((tmp_path / "models").iterdir()) == []


@pytest.mark.parametrize("environment", [{"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:9"}])
def test_error_for_an_unreachable_hub_says_what_to_do(tmp_path: Path, environment: dict[str, str]) -> None:
    error = import_model("org/tiny", tmp_path, **environment)
    assert error["code"] == "unavailable"
    assert "download it elsewhere and import the directory" in error["message"]
    assert list((tmp_path / "models").iterdir()) == []


def test_silent_hub_times_out_at_the_clients_limit(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        error = import_model("org/tiny", tmp_path, HF_ENDPOINT=address, HF_HUB_ETAG_TIMEOUT="1")
    assert error["code"] == "unavailable"
    assert "timed out" in error["message"]


@pytest.mark.parametrize(
    ("text", "parsed"),
    [
        ("org/name", ("org/name", None)),
        ("org/name-1.5_b@refs/pr/1", ("org/name-1.5_b", "refs/pr/1")),
        ("name", None),
        ("/org/name", None),
        ("./name", None),
        ("org/name/file", None),
        ("org/name@../../x", None),
        ("org/na--me", None),
        ("org/näme", None),
    ],
)
def test_hub_id_is_distinguished_from_other_text(text: str, parsed: tuple[str, str | None] | None) -> None:
    assert parse_hub_id(text) == parsed
