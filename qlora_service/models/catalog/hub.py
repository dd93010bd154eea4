"""Base models from the Hugging Face hub."""

from __future__ import annotations

import re
from pathlib import Path

from qlora_service.data.rendering.tokenizer_settings import TOOL_TEMPLATE
from qlora_service.errors import InvalidModel, Unavailable
from qlora_service.models.catalog.inspection import inspect_settings

_HUB_ID = re.compile(r"(?P<id>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<revision>[A-Za-z0-9][\w./-]*))?", re.ASCII)

_SETTINGS_FILES = ["*.json"]
_MODEL_FILES = [
    *_SETTINGS_FILES,
    "*.safetensors",
    "*.jinja",
    "*.model",
    "vocab.txt",
    "merges.txt",
    "LICENSE*",
    "README.md",
]
# Folders hold other formats of the same weights; `consolidated` is Mistral's second copy of them.
_IGNORED_FILES = ["*/*", "consolidated*.safetensors"]


def parse_hub_id(text: str) -> tuple[str, str | None] | None:
    """`org/name[@revision]` as (hub id, revision); None for any other text."""
    match = _HUB_ID.fullmatch(text)
    if match is None or ".." in text or "--" in match["id"]:
        return None
    return match["id"], match["revision"]


def fetch_snapshot(hub_id: str, revision: str | None) -> Path:
    """The directory of the model's files in the hub client's cache; its name is the commit hash.

    Fetches settings first, so that a model that they rule out is refused before gigabytes of weights are fetched.
    With HF_HUB_OFFLINE=1, or without a network, uses the files that the cache holds.

    Raises:
        InvalidModel: this user cannot access such a model or revision on the hub, or its settings are refused.
        Unavailable: the hub cannot be reached.
    """
    try:
        import httpx2
        from huggingface_hub import errors, snapshot_download
    except ImportError as error:
        raise Unavailable(
            f'{hub_id} cannot be fetched: install the hub client with pip install "qlora-service[train]"'
        ) from error
    label = f"{hub_id}@{revision}" if revision else hub_id
    connection_error: Exception | None = None
    try:
        connection_error = _connection_error(hub_id, revision)
        # The client's default cache, so that a snapshot fetched earlier is available without a network.
        is_offline = connection_error is not None
        options = {"ignore_patterns": _IGNORED_FILES, "local_files_only": is_offline}
        settings = snapshot_download(hub_id, revision=revision, allow_patterns=_SETTINGS_FILES, **options)
        inspect_settings(Path(settings), label)
        commit = Path(settings).name
        snapshot_download(hub_id, revision=commit, allow_patterns=[TOOL_TEMPLATE], local_files_only=is_offline)
        return Path(snapshot_download(hub_id, revision=commit, allow_patterns=_MODEL_FILES, **options))
    except errors.GatedRepoError as error:
        raise InvalidModel(
            f"{label} is gated: accept its terms on its page at the hub, then set HF_TOKEN and import again"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise InvalidModel(
            f"{label} is neither a local path nor a model on the hub: check the spelling; "
            "for a private model set HF_TOKEN"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise InvalidModel(f"{hub_id} has no revision {revision}: name a branch, a tag or a commit") from error
    except errors.HFValidationError as error:
        raise InvalidModel(f"{label} is neither a local path nor a hub id: {error}") from error
    except (OSError, httpx2.HTTPError) as error:
        raise _unreachable(label, connection_error or error) from error


def _connection_error(hub_id: str, revision: str | None) -> Exception | None:
    """The error that prevents a connection to the hub, or None; raises an error that the hub returns for the model.

    Needed because the client's own look-up has no time limit: behind a firewall that drops packets it hangs.
    """
    import httpx2
    from huggingface_hub import HfApi, constants, errors

    try:
        HfApi().model_info(hub_id, revision=revision, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    except (errors.OfflineModeIsEnabled, httpx2.TransportError) as error:
        return error
    return None


def _unreachable(label: str, error: Exception) -> Unavailable:
    reason = str(error).strip().splitlines()
    return Unavailable(
        f"{label} is not a local path, and the hub could not be reached to fetch it: "
        "connect and unset HF_HUB_OFFLINE, or download it elsewhere and import the directory "
        f"({type(error).__name__}: {reason[0] if reason else 'no reason given'})"
    )
