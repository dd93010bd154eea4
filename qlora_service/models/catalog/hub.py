"""Base models from the Hugging Face hub."""

from __future__ import annotations

import re
from pathlib import Path

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
_LEFT_OUT = ["*/*", "consolidated*.safetensors"]


def parse_hub_id(text: str) -> tuple[str, str | None] | None:
    """`org/name[@revision]` as (hub id, revision); None where the text is nothing of the kind."""
    match = _HUB_ID.fullmatch(text)
    if match is None or ".." in text or "--" in match["id"]:
        return None
    return match["id"], match["revision"]


def fetch_snapshot(hub_id: str, revision: str | None) -> Path:
    """The model's files in the hub client's cache; the directory's name is the commit hash.

    Settings come first, so that what they forbid is refused before gigabytes of weights are fetched.
    With HF_HUB_OFFLINE=1, or without a network, what the cache already holds is enough.

    Raises:
        InvalidModel: the hub has no such model or revision for us, or its settings are refused.
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
    no_answer: Exception | None = None
    try:
        no_answer = _no_answer(hub_id, revision)
        # The client's cache: what was fetched once is there without a network.
        options = {"ignore_patterns": _LEFT_OUT, "local_files_only": no_answer is not None}
        settings = snapshot_download(hub_id, revision=revision, allow_patterns=_SETTINGS_FILES, **options)
        inspect_settings(Path(settings), label)
        commit = Path(settings).name
        return Path(snapshot_download(hub_id, revision=commit, allow_patterns=_MODEL_FILES, **options))
    except errors.GatedRepoError as error:
        raise InvalidModel(
            f"{label} is gated: accept its terms on its page at the hub, then set HF_TOKEN and import again"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise InvalidModel(
            f"{label} is neither a path here nor a model on the hub: check the spelling; "
            "for a private model set HF_TOKEN"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise InvalidModel(f"{hub_id} has no revision {revision}: name a branch, a tag or a commit") from error
    except errors.HFValidationError as error:
        raise InvalidModel(f"{label} is neither a path here nor a hub id: {error}") from error
    except (OSError, httpx2.HTTPError) as error:
        raise _unreachable(label, no_answer or error) from error


def _no_answer(hub_id: str, revision: str | None) -> Exception | None:
    """Why the hub does not answer, None where it does; what it answers against the model is raised.

    The client's own look-up has no time limit: where a firewall swallows packets it hangs.
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
        f"{label} is not a path here, and the hub could not be reached to fetch it: "
        "connect and unset HF_HUB_OFFLINE, or download it elsewhere and import the directory "
        f"({type(error).__name__}: {reason[0] if reason else 'no reason given'})"
    )
