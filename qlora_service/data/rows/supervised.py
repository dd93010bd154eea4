"""Readers of rows for supervised training: conversations, prompts with answers, and plain text."""

from __future__ import annotations

from typing import Any

from qlora_service.data.json.strict import RowProblem
from qlora_service.data.rows.cells import (
    Notes,
    as_list,
    as_text,
    json_cell,
    optional_text,
    require_not_blank,
)
from qlora_service.data.rows.chat_options import ChatOptions, read_options
from qlora_service.data.rows.conversation import OPENAI, SHAREGPT, Turn, messages_or_text, plain_turn, read_turns
from qlora_service.data.rows.examples import Chat, Completion, Text


def read_messages(row: dict[str, Any], notes: Notes) -> Chat:
    turns = read_turns(json_cell(row, "messages"), "/messages", OPENAI, notes)
    return _conversation(turns, "/messages", row, notes)


def read_sharegpt(row: dict[str, Any], notes: Notes) -> Chat:
    if row.get("chosen") is not None and row.get("rejected") is not None:
        # The conversation is only the context of the two answers: training on it would train neither answer.
        raise RowProblem(
            "/chosen",
            "the row is a preference pair: state the shape preference, or end the conversation with the chosen answer",
        )
    return _conversation(sharegpt_turns(row, notes), "/conversations", row, notes)


def read_alpaca(row: dict[str, Any], notes: Notes) -> Chat:
    turns = [*alpaca_prompt(row), plain_turn("assistant", _answer(row, "output"), "/output")]
    return _conversation(turns, "/output", row, notes)


def read_dolly(row: dict[str, Any], notes: Notes) -> Chat:
    question = plain_turn("user", _instruction(row, "context"), "/instruction")
    turns = [question, plain_turn("assistant", _answer(row, "response"), "/response")]
    return _conversation(turns, "/response", row, notes)


def read_prompt_completion(row: dict[str, Any], notes: Notes) -> Completion | Chat:
    prompt, completion = messages_or_text(row["prompt"]), messages_or_text(row["completion"])
    if not isinstance(prompt, list) and not isinstance(completion, list):
        return Completion(as_text(row["prompt"], "/prompt"), _answer(row, "completion"))
    # A conversation with a text as its answer, or a question with messages as the answer.
    before = (
        [plain_turn("user", prompt, "/prompt")]
        if isinstance(prompt, str)
        else read_turns(prompt, "/prompt", OPENAI, notes)
    )
    answer = (
        [plain_turn("assistant", _answer(row, "completion"), "/completion")]
        if isinstance(completion, str)
        else read_turns(completion, "/completion", OPENAI, notes)
    )
    return chat_with_answer(before, answer, "/completion", read_options(row, notes))


def read_text(row: dict[str, Any], notes: Notes) -> Text:  # noqa: ARG001 - the signature of all readers
    text = as_text(row["text"], "/text")
    require_not_blank(text, "/text", "the text")
    return Text(text)


def chat_with_answer(prompt: list[Turn], answer: list[Turn], pointer: str, options: ChatOptions) -> Chat:
    """The conversation of a prompt and the answer at `pointer`; no turn of the prompt is trained.

    Raises:
        RowProblem: no turn of the answer is trained either.
    """
    if not any(turn.trained for turn in answer):
        raise RowProblem(pointer, "no assistant message to train")
    return Chat(
        messages=tuple(turn.message for turn in prompt + answer),
        trained=(False,) * len(prompt) + tuple(turn.trained for turn in answer),
        tools=options.tools,
        documents=options.documents,
        template_arguments=options.template_arguments,
        text_pointers=tuple(turn.text_pointer for turn in prompt + answer),
    )


def sharegpt_turns(row: dict[str, Any], notes: Notes) -> list[Turn]:
    """The turns of the column `conversations`, after a system turn for the text of the column `system`."""
    turns = read_turns(json_cell(row, "conversations"), "/conversations", SHAREGPT, notes)
    return [*_system_turn(optional_text(row, "system")), *turns]


def alpaca_prompt(row: dict[str, Any]) -> list[Turn]:
    """The turns before the answer: system, history, and the instruction with its input."""
    turns = [plain_turn("user", _instruction(row, "input"), "/instruction")]
    history = json_cell(row, "history")
    for index, exchange in enumerate([] if history is None else as_list(history, "/history")):
        pointer = f"/history/{index}"
        if not isinstance(exchange, list) or len(exchange) != 2:
            raise RowProblem(pointer, "must be a pair [user, assistant]")
        user, assistant = (as_text(text, f"{pointer}/{side}") for side, text in enumerate(exchange))
        require_not_blank(assistant, f"{pointer}/1", "the answer")
        turns[-1:-1] = [plain_turn("user", user, f"{pointer}/0"), plain_turn("assistant", assistant, f"{pointer}/1")]
    return [*_system_turn(optional_text(row, "system")), *turns]


def _conversation(turns: list[Turn], pointer: str, row: dict[str, Any], notes: Notes) -> Chat:
    """The conversation without a separate prompt."""
    return chat_with_answer([], turns, pointer, read_options(row, notes))


def _system_turn(text: str) -> list[Turn]:
    return [plain_turn("system", text, "/system")] if text else []


def _instruction(row: dict[str, Any], extra_column: str) -> str:
    """The instruction and, after a blank line, the text of the extra column."""
    parts = [as_text(row["instruction"], "/instruction"), optional_text(row, extra_column)]
    instruction = "\n\n".join(part for part in parts if part.strip())
    require_not_blank(instruction, "/instruction", "the instruction")
    return instruction


def _answer(row: dict[str, Any], column: str) -> str:
    text = as_text(row[column], f"/{column}")
    require_not_blank(text, f"/{column}", "the answer")
    return text
