"""Conversations whose letters are replaced by marks."""

from __future__ import annotations

from typing import Any

import pytest

from qlora_service.data.rendering.field_marks import MarkedConversation, mark_text


@pytest.mark.parametrize(
    ("text", "marked"),
    [
        ("One, two.", "###, ###."),
        ("a_b-c 42", "#_#-# ##"),
        ("<think>\nso\n</think>\n\n!", "<think>\n##\n</think>\n\n#"),
        ("[INST] go [/INST]", "[INST] ## [/INST]"),
        ("a < b > c", "# < # > #"),
        ("你好, 😀", "##, #"),
        ("?!", "##"),
        ("<b/>", "<#/>"),
        ("[A]", "[#]"),
        (" \n", " \n"),
    ],
)
def test_letters_are_marked_and_what_templates_look_for_is_kept(text: str, marked: str) -> None:
    assert mark_text(text, "#") == marked


def test_every_field_has_its_own_mark() -> None:
    message: dict[str, Any] = {
        "role": "assistant",
        "content": "words",
        "thinking": "why",
        "reasoning_content": "why",
        "tool_calls": [
            {"id": "a1", "function": {"name": "ferry", "arguments": '{"pier": "north \\u00e9", "n": 2}'}},
            {"id": "a2", "function": {"name": "ferry", "arguments": {"pier": ["x", {"y": "z"}], "n": 2}}},
        ],
    }
    marked = MarkedConversation.of([{"role": "user", "content": "hi"}, message], "")
    assert [(field.message, field.pointer, field.marks) for field in marked.fields.values()] == [
        (0, "/content", 2),
        (1, "/content", 5),
        (1, "/reasoning_content", 3),
        (1, "/tool_calls/0/function/name", 5),
        (1, "/tool_calls/0/function/arguments", 10),
        (1, "/tool_calls/1/function/name", 5),
        (1, "/tool_calls/1/function/arguments", 2),
    ]
    assert marked.messages[1]["thinking"] == marked.messages[1]["reasoning_content"]
    first, second = (call["function"]["arguments"] for call in marked.messages[1]["tool_calls"])
    assert "\\u00e9" in first
    assert second["n"] == 2
    for message in marked.messages:
        for run in marked.find_marks(str(message.get("content"))):
            assert marked.fields[run[1]].message == marked.messages.index(message)


def test_characters_of_the_text_are_not_used_as_marks() -> None:
    marked = MarkedConversation.of([{"role": "user", "content": "hi"}], "\U000f0000 and \U000f0001")
    assert list(marked.fields) == ["\U000f0002"]
    assert list(marked.find_marks("\U000f0000")) == []
