"""Special tokens and chat template of a base model, read from its small settings files.

The files come with the model and may contain anything. Only this module reads them, for import and for rendering.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from qlora_service.errors import Finding, InvalidModel

# The largest files in use have about 100 KiB.
MAX_SETTINGS_BYTES = 4 << 20
CHAT_TEMPLATE = "chat_template.jinja"
TOOL_TEMPLATE = "additional_chat_templates/tool_use.jinja"
TOKENIZER_CONFIG = "tokenizer_config.json"
GENERATION_CONFIG = "generation_config.json"
TOKENS_MAP = "special_tokens_map.json"
MODEL_CONFIG = "config.json"
# transformers requires JSON objects in these files.
OBJECTS = {MODEL_CONFIG, GENERATION_CONFIG, TOKENIZER_CONFIG, TOKENS_MAP}
# transformers accepts only text for these keys; other keys that end in _token may be switches (add_bos_token).
SPECIAL_TOKENS = {"bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"}

# For base models without a template; stored with the adapter, so that inference uses it too.
PLAIN_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message.role == 'assistant' %}{{ '### Response:\\n' + message.content + eos_token }}"
    "{% elif message.role == 'user' %}{{ '### Instruction:\\n' + message.content + '\\n\\n' }}"
    "{% else %}{{ message.content + '\\n\\n' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '### Response:\\n' }}{% endif %}"
)


@dataclass(frozen=True)
class TokenizerSettings:
    """Special tokens by their names in templates, the chat template if any, and the token ids that end generation."""

    special_tokens: dict[str, str]
    chat_template: str | None
    eos_token_ids: frozenset[int]
    bos_token_id: int | None

    @property
    def has_own_template(self) -> bool:
        """Whether the model came with a chat template; that of an adapter of a model without one does not count."""
        return bool(self.chat_template) and not str(self.chat_template).endswith(PLAIN_TEMPLATE)


def read_tokenizer_settings(model_dir: Path) -> TokenizerSettings:
    """The settings of a model in the catalog.

    Raises:
        InvalidModel: with a finding for everything that cannot be used.
    """
    findings: list[str] = []
    documents = {
        name: read_json(model_dir / name, name, findings)
        for name in (TOKENIZER_CONFIG, TOKENS_MAP, GENERATION_CONFIG, MODEL_CONFIG)
        if (model_dir / name).is_file()
    }
    settings = tokenizer_settings(documents, model_dir / CHAT_TEMPLATE, findings)
    if findings:
        raise InvalidModel(
            f"the base model's settings cannot be used: {'; '.join(findings)}: "
            "correct the files and import the model again",
            location="/base_model",
            findings=[Finding(reason) for reason in findings],
        )
    return settings


def tokenizer_settings(documents: Mapping[str, Any], template_file: Path, findings: list[str]) -> TokenizerSettings:
    """The settings in JSON documents, by file name, and in the template file; appends to `findings`."""
    config, model = documents.get(TOKENIZER_CONFIG, {}), documents.get(MODEL_CONFIG, {})
    generation = documents.get(GENERATION_CONFIG, {})
    # Older models list their special tokens in a separate file, some only as ids in the model's config.
    mapped_tokens = _special_tokens(documents.get(TOKENS_MAP, {}), TOKENS_MAP, findings)
    source = GENERATION_CONFIG if "eos_token_id" in generation else MODEL_CONFIG
    eos = (generation if "eos_token_id" in generation else model).get("eos_token_id")
    bos = model.get("bos_token_id")
    templates = {
        "default": _read_template(template_file, findings),
        "tool_use": _read_template(template_file.parent / TOOL_TEMPLATE, findings),
    }
    if templates == {"default": None, "tool_use": None}:
        templates = _configured_templates(config.get("chat_template"), findings)
    return TokenizerSettings(
        mapped_tokens | _special_tokens(config, TOKENIZER_CONFIG, findings),
        _one_template(**templates),
        _eos_token_ids(eos, source, findings),
        bos if type(bos) is int else None,
    )


def read_json(path: Path, name: str, findings: list[str], limit_bytes: int = MAX_SETTINGS_BYTES) -> Any:
    """The document; an empty object and a finding where it cannot be read, or is not an object but must be."""
    content = _read(path, name, findings, limit_bytes)
    if content is None:
        return {}
    try:
        document = json.loads(content)
    except (ValueError, RecursionError):
        findings.append(f"{name} is not valid JSON")
        return {}
    if name in OBJECTS and not isinstance(document, dict):
        findings.append(f"{name} is not a JSON object")
        return {}
    return document


def _read(path: Path, name: str, findings: list[str], limit_bytes: int) -> bytes | None:
    if path.stat().st_size > limit_bytes:
        findings.append(f"{name} is larger than {limit_bytes >> 20} MiB")
        return None
    return path.read_bytes()


def _read_template(path: Path, findings: list[str]) -> str | None:
    content = _read(path, path.name, findings, MAX_SETTINGS_BYTES) if path.is_file() else None
    try:
        return None if content is None else content.decode()
    except UnicodeDecodeError as error:
        findings.append(f"{path.name} is not valid UTF-8 at byte {error.start}")
        return None


def _special_tokens(config: dict[str, Any], name: str, findings: list[str]) -> dict[str, str]:
    tokens = {}
    for key, value in config.items():
        token = value.get("content") if isinstance(value, dict) else value
        if key.endswith("_token") and _is_text(token):
            tokens[key] = token
        elif key in SPECIAL_TOKENS and value is not None:
            findings.append(f"{name} has a {key} that is not text")
    return tokens


def _configured_templates(templates: Any, findings: list[str]) -> dict[str, str | None]:
    """The templates named default and tool_use in tokenizer_config.json; a single template is the default."""
    if isinstance(templates, list) and all(isinstance(entry, dict) for entry in templates):
        templates = {str(entry.get("name")): entry.get("template") for entry in templates}
    named: dict[str, Any] = templates if isinstance(templates, dict) else {"default": templates}
    used = {name: named.get(name) for name in ("default", "tool_use")}
    if all(template is None or _is_text(template) for template in used.values()):
        return used
    findings.append(f"{TOKENIZER_CONFIG} has a chat_template that is not text")
    return dict.fromkeys(used)


def _one_template(default: str | None, tool_use: str | None) -> str | None:
    """A template that renders conversations with tools by `tool_use`, as transformers does, and others by `default`.

    Source: transformers 5.23, `get_chat_template`.
    """
    if tool_use is None:
        return default
    refusal = "{{ raise_exception('the model has a chat template for conversations with tools only') }}"
    default, tool_use = (part.removesuffix("\n") for part in (refusal if default is None else default, tool_use))
    # Jinja strips one line break after a block, and white space before one but not before an expression.
    keep = "{{ '' }}"
    return f"{{% if tools is not none %}}\n{tool_use}{keep}{{% else %}}\n{default}{keep}{{% endif %}}"


def _eos_token_ids(value: Any, name: str, findings: list[str]) -> frozenset[int]:
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if all(type(token_id) is int for token_id in ids):
        return frozenset(ids)
    findings.append(f"{name} has an eos_token_id that is neither a number nor a list of numbers")
    return frozenset()


def _is_text(value: Any) -> TypeGuard[str]:
    """Whether the value is a string without unpaired surrogates, which JSON can escape and no tokenizer accepts."""
    return isinstance(value, str) and value.encode(errors="ignore").decode() == value
