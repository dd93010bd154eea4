"""Untrusted settings files: usable settings are read, everything else is refused with the name of the file."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from qlora_service.data.rendering.chat_template import ChatTemplate, Conversation, TemplateError
from qlora_service.data.rendering.tokenizer_settings import read_tokenizer_settings
from qlora_service.errors import InvalidModel
from tests.tiny_model import tiny_tokenizer

NOW = datetime(2026, 3, 1, tzinfo=UTC)


def write(directory: Path, name: str, content: Any) -> Path:
    (directory / name).write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return directory


def test_special_tokens_are_text_or_objects_with_text_and_switches_are_ignored(tmp_path: Path) -> None:
    config = {
        "bos_token": {"content": "<s>", "special": True},
        "eos_token": "</s>",
        "pad_token": None,
        "image_token": "<image>",
        "add_bos_token": True,
        "number_token": 5,
    }
    tokens = read_tokenizer_settings(write(tmp_path, "tokenizer_config.json", config)).special_tokens
    assert tokens == {"bos_token": "<s>", "eos_token": "</s>", "image_token": "<image>"}


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("one", "one"),
        ([{"name": "rag", "template": "documents"}, {"name": "default", "template": "one"}], "one"),
        ([{"name": "rag", "template": "documents"}], None),
        ({"default": "one", "rag": 5}, "one"),
        (None, None),
    ],
)
def test_template_named_default_is_used(tmp_path: Path, template: Any, expected: str | None) -> None:
    settings = read_tokenizer_settings(write(tmp_path, "tokenizer_config.json", {"chat_template": template}))
    assert settings.chat_template == expected


def test_template_file_has_precedence_over_the_config(tmp_path: Path) -> None:
    write(tmp_path, "tokenizer_config.json", {"chat_template": "config's"})
    assert read_tokenizer_settings(write(tmp_path, "chat_template.jinja", "für 你".encode())).chat_template == "für 你"


EDGES = ["  {% if true %}q{% endif %}\n", "\n  x\n  ", "{%- if true %} y {%- endif -%}\n", "z\n\n", "{{ tools }}"]


@pytest.mark.parametrize("is_file", [True, False])
@pytest.mark.parametrize("default", EDGES)
@pytest.mark.parametrize("tool_use", EDGES)
def test_template_for_tools_renders_conversations_with_tools_as_transformers_does(
    tmp_path: Path, default: str, tool_use: str, is_file: bool
) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = {"default": default, "tool_use": tool_use}
    if is_file:
        tokenizer.save_pretrained(tmp_path)
    else:
        named = [{"name": name, "template": template} for name, template in tokenizer.chat_template.items()]
        write(tmp_path, "tokenizer_config.json", {"chat_template": named})
    settings = read_tokenizer_settings(tmp_path)
    assert settings.has_own_template
    template = ChatTemplate(settings.chat_template or "", settings.special_tokens, NOW)
    messages = ({"role": "user", "content": "hi"},)
    for tools in (None, [], [{"name": "clock"}]):
        expected = tokenizer.apply_chat_template(list(messages), tools=tools, tokenize=False)
        assert template.text(Conversation(messages, tools)) == expected


def test_template_for_tools_alone_refuses_other_conversations(tmp_path: Path) -> None:
    settings = read_tokenizer_settings(
        write(tmp_path, "tokenizer_config.json", {"chat_template": {"tool_use": "{{ messages[0].content }}"}})
    )
    template = ChatTemplate(settings.chat_template or "", {}, NOW)
    messages = ({"role": "user", "content": "hi"},)
    assert template.text(Conversation(messages, [])) == "hi"
    with pytest.raises(TemplateError, match="conversations with tools only"):
        template.text(Conversation(messages))


@pytest.mark.parametrize(("value", "ids"), [(2, {2}), ([1, 2], {1, 2}), ([], set()), (None, set())])
def test_one_token_or_several_end_generation(tmp_path: Path, value: Any, ids: set[int]) -> None:
    settings = read_tokenizer_settings(write(tmp_path, "generation_config.json", {"eos_token_id": value}))
    assert settings.eos_token_ids == ids


def test_model_without_settings_has_empty_ones(tmp_path: Path) -> None:
    settings = read_tokenizer_settings(tmp_path)
    assert (settings.special_tokens, settings.chat_template, settings.eos_token_ids) == ({}, None, frozenset())


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("generation_config.json", {"eos_token_id": [[1]]}, "eos_token_id"),
        ("generation_config.json", {"eos_token_id": {"a": 1}}, "eos_token_id"),
        ("generation_config.json", {"eos_token_id": "2"}, "eos_token_id"),
        ("generation_config.json", {"eos_token_id": True}, "eos_token_id"),
        ("generation_config.json", b"{", "not valid JSON"),
        ("generation_config.json", b"[" * 100_000, "not valid JSON"),
        ("generation_config.json", b'{"a": "\xff"}', "not valid JSON"),
        ("generation_config.json", [1], "not a JSON object"),
        ("generation_config.json", b" " * (5 << 20), "larger than 4 MiB"),
        ("tokenizer_config.json", [], "not a JSON object"),
        ("tokenizer_config.json", {"eos_token": {"x": 1}}, "eos_token"),
        ("tokenizer_config.json", {"eos_token": {"content": 5}}, "eos_token"),
        ("tokenizer_config.json", {"bos_token": ["<s>"]}, "bos_token"),
        ("tokenizer_config.json", {"eos_token": "\ud800"}, "eos_token"),
        ("tokenizer_config.json", {"chat_template": 5}, "chat_template"),
        ("tokenizer_config.json", {"chat_template": ["one"]}, "chat_template"),
        ("tokenizer_config.json", {"chat_template": [{"name": ["default"]}, {"name": "default", "template": {}}]}, "t"),
        ("tokenizer_config.json", {"chat_template": "{{ '\ud800' }}"}, "chat_template"),
        ("chat_template.jinja", b"\xff\xfe", "not valid UTF-8 at byte 0"),
        ("chat_template.jinja", b"x" * (5 << 20), "larger than 4 MiB"),
    ],
)
def test_unusable_settings_are_refused_with_the_file_name(tmp_path: Path, name: str, content: Any, reason: str) -> None:
    with pytest.raises(InvalidModel) as caught:
        read_tokenizer_settings(write(tmp_path, name, content))
    (finding,) = caught.value.findings
    assert finding.reason.startswith(name)
    assert reason in finding.reason


def test_all_findings_are_collected(tmp_path: Path) -> None:
    write(tmp_path, "generation_config.json", {"eos_token_id": "2"})
    write(tmp_path, "chat_template.jinja", b"\xff")
    with pytest.raises(InvalidModel) as caught:
        read_tokenizer_settings(write(tmp_path, "tokenizer_config.json", {"eos_token": 5, "bos_token": 6}))
    assert len(caught.value.findings) == 4
