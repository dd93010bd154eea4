"""Rows as people send them, from ../shared/cases: what the readers make of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from qlora_service.data.files.checks import check_dataset, read_examples
from qlora_service.data.rows.examples import Chat

CASES = Path(__file__).parents[5] / "shared" / "cases"


def chats(file: str) -> list[Chat]:
    """The conversations of a case's file, whose rows are all usable without a warning."""
    path = CASES / file
    if not path.is_file():
        pytest.skip(f"no {file} in ../shared/cases")
    report = check_dataset(path)
    assert (report.finding_count, report.warnings) == (0, ())
    read = [row.example for row in read_examples(path, report.container, report.shape)]
    conversations = [example for example in read if isinstance(example, Chat)]
    assert len(conversations) == len(read) == report.rows > 0
    return conversations


def test_functions_are_the_tools() -> None:
    for chat in chats("legacy-functions-dropped/functions-legacy.jsonl"):
        assert chat.tools is not None
        assert [(tool["type"], tool["function"]["name"]) for tool in chat.tools] == [("function", "ferry")]
        assert chat.messages[1]["tool_calls"][0]["function"]["name"] == "ferry"


def test_message_with_train_false_is_not_trained() -> None:
    for chat in chats("train-false-ignored/train-false.jsonl"):
        assert chat.trained == (False, False, False, True)
        assert not any("train" in message for message in chat.messages)


def test_template_variables_and_documents_of_the_row_are_read() -> None:
    for chat in chats("train-false-ignored/chat-kwargs.jsonl"):
        assert chat.template_arguments == {"enable_thinking": False}
        assert chat.documents == ({"title": "a", "text": "b"},)


@pytest.mark.parametrize("case", ["null-content-becomes-None", "tool-calls-not-trained"])
def test_null_content_is_no_content(case: str) -> None:
    for chat in chats(f"{case}/agent-null.jsonl"):
        assert "content" not in chat.messages[1]
        assert None not in [value for message in chat.messages for value in message.values()]


@pytest.mark.parametrize(("file", "keys"), [("reasoning-key", {"reasoning"}), ("thinking-keys", {"thinking"})])
def test_thought_is_kept(file: str, keys: set[str]) -> None:
    for chat in chats(f"reasoning-keys-dropped/{file}.jsonl"):
        assert chat.messages[-1].keys() - {"role", "content"} == keys


@pytest.mark.parametrize("file", ["agent-empty", "agent-null", "agent"])
def test_every_answer_with_a_call_is_trained(file: str) -> None:
    conversations = chats(f"tool-calls-not-trained/{file}.jsonl")
    assert any("tool_calls" in message for chat in conversations for message in chat.messages)
    for chat in conversations:
        assert chat.trained == tuple(message["role"] == "assistant" for message in chat.messages)
