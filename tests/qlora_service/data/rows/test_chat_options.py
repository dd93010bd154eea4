from __future__ import annotations

import json
from typing import Any

import pytest

from qlora_service.data.rows.cells import Notes
from qlora_service.data.rows.examples import Chat, Shape, documents
from qlora_service.data.rows.shapes import RowProblem, to_example

USER = {"role": "user", "content": "¿Quién?"}
GOOD, BAD = {"role": "assistant", "content": "Ana"}, {"role": "assistant", "content": "Luis"}
DOCUMENT = {"title": "a", "text": None}
ARGUMENTS = {"enable_thinking": False, "bos_token": ""}
TOOL = {"type": "function", "function": {"name": "now"}}
CONVERSATIONS: list[tuple[Shape, dict[str, Any]]] = [
    ("messages", {"messages": [USER, GOOD]}),
    ("sharegpt", {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}),
    ("alpaca", {"instruction": "a", "output": "b"}),
    ("dolly", {"instruction": "a", "response": "b"}),
    ("prompt_completion", {"prompt": [USER], "completion": [GOOD]}),
    ("preference", {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}),
    ("preference", {"chosen": [USER, GOOD], "rejected": [USER, BAD]}),
    ("preference", {"input": {"messages": [USER]}, "preferred_output": [GOOD], "non_preferred_output": [BAD]}),
    ("kto", {"messages": [USER, GOOD], "label": True}),
    ("kto", {"prompt": [USER], "completion": [GOOD], "label": True}),
]


@pytest.mark.parametrize("encode", [lambda value: value, json.dumps])
@pytest.mark.parametrize(("shape", "row"), CONVERSATIONS)
def test_every_conversation_gets_the_options_of_its_row(shape: Shape, row: dict[str, Any], encode: Any) -> None:
    options = {"tools": [TOOL], "documents": [DOCUMENT], "chat_template_kwargs": ARGUMENTS}
    notes: Notes = []
    example = to_example(row | {key: encode(value) for key, value in options.items()}, shape, notes)
    for chat in documents(example):
        assert isinstance(chat, Chat)
        assert (chat.tools, chat.documents, chat.template_arguments) == ((TOOL,), (DOCUMENT,), ARGUMENTS)
    assert notes == []


def test_options_of_openai_input_come_before_those_of_the_row() -> None:
    request = {"messages": [USER], "tools": [TOOL], "chat_template_kwargs": {"a": 1}}
    row = {"input": json.dumps(request), "preferred_output": json.dumps([GOOD]), "non_preferred_output": [BAD]}
    example = to_example(row | {"functions": [{"name": "f"}], "chat_template_kwargs": {"a": 2}}, "preference")
    for chat in documents(example):
        assert isinstance(chat, Chat)
        assert (chat.tools, chat.template_arguments) == ((TOOL,), {"a": 1})


@pytest.mark.parametrize("blank", [None, "", "null", [], "[]"])
def test_blank_options_are_none(blank: Any) -> None:
    chat = to_example({"messages": [USER, GOOD], "documents": blank, "tools": blank, "functions": blank}, "messages")
    assert chat == Chat((USER, GOOD), (False, True))
    assert to_example({"messages": [USER, GOOD], "chat_template_kwargs": {}}, "messages") == chat


@pytest.mark.parametrize(
    ("options", "pointer", "reason"),
    [
        ({"documents": {}}, "/documents", "must be a list, is an object"),
        ({"documents": ["a"]}, "/documents/0", "must be an object, is a string"),
        ({"documents": "[{]"}, "/documents", "not valid JSON"),
        ({"chat_template_kwargs": [1]}, "/chat_template_kwargs", "must be an object, is a list"),
        ({"chat_template_kwargs": "yes"}, "/chat_template_kwargs", "must be an object, is a string"),
        ({"chat_template_kwargs": {"messages": []}}, "/chat_template_kwargs/messages", "cannot set messages"),
        (
            {"chat_template_kwargs": {"add_generation_prompt": True}},
            "/chat_template_kwargs/add_generation_prompt",
            "leave it out",
        ),
    ],
)
def test_unreadable_option_is_a_problem_at_its_pointer(options: dict[str, Any], pointer: str, reason: str) -> None:
    with pytest.raises(RowProblem) as caught:
        to_example({"messages": [USER, GOOD], **options}, "messages")
    assert (caught.value.pointer, reason in caught.value.reason) == (pointer, True), caught.value.reason
