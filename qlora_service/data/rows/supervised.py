"""Rows of the shapes that hold answers to learn, or text."""

from __future__ import annotations

from typing import Any

from qlora_service.data.json.strict import RowProblem
from qlora_service.data.rows.conversation import (
    OPENAI,
    SHAREGPT,
    Turn,
    as_list,
    as_text,
    optional_text,
    plain_turns,
    read_tools,
    read_turns,
    require_words,
)
from qlora_service.data.rows.examples import Chat, Completion, Text


def read_messages(row: dict[str, Any]) -> Chat:
    return _chat(read_turns(row["messages"], "/messages", OPENAI), "/messages", row)


def read_sharegpt(row: dict[str, Any]) -> Chat:
    if row.get("chosen") is not None and row.get("rejected") is not None:
        # Its conversation is only the context of two answers: training on it would teach neither.
        raise RowProblem(
            "/chosen", "a preference pair: state the shape preference, or end the conversation with the chosen answer"
        )
    return _chat(sharegpt_turns(row), "/conversations", row)


def read_alpaca(row: dict[str, Any]) -> Chat:
    turns = [*alpaca_question(row), *plain_turns([("assistant", _answer(row, "output"))])]
    return _chat(turns, "/output", None)


def read_dolly(row: dict[str, Any]) -> Chat:
    turns = plain_turns([("user", _instruction(row, "context")), ("assistant", _answer(row, "response"))])
    return _chat(turns, "/response", None)


def read_prompt_completion(row: dict[str, Any]) -> Completion | Chat:
    if not isinstance(row["prompt"], list) and not isinstance(row["completion"], list):
        return Completion(as_text(row["prompt"], "/prompt"), _answer(row, "completion"))
    prompt = read_turns(row["prompt"], "/prompt", OPENAI)
    completion = read_turns(row["completion"], "/completion", OPENAI)
    return answered(prompt, completion, "/completion", read_tools(row))


def read_text(row: dict[str, Any]) -> Text:
    text = as_text(row["text"], "/text")
    require_words(text, "/text", "the text")
    return Text(text)


def answered(prompt: list[Turn], answer: list[Turn], at: str, tools: tuple[dict[str, Any], ...] | None) -> Chat:
    """The conversation of a prompt and its answer, read from the pointer `at`; nothing of the prompt is trained.

    Raises:
        RowProblem: nothing of the answer is trained either.
    """
    if not any(trained for _, trained in answer):
        raise RowProblem(at, "no assistant message to train")
    return Chat(
        messages=tuple(message for message, _ in prompt + answer),
        trained=(False,) * len(prompt) + tuple(trained for _, trained in answer),
        tools=tools,
    )


def sharegpt_turns(row: dict[str, Any]) -> list[Turn]:
    """The `conversations`, behind the `system` column's text if there is one."""
    system, turns = optional_text(row, "system"), read_turns(row["conversations"], "/conversations", SHAREGPT)
    return [*_system_turn(system), *turns]


def alpaca_question(row: dict[str, Any]) -> list[Turn]:
    """The turns before the answer: system, history, and the instruction with its input."""
    turns = [("user", _instruction(row, "input"))]
    history = row.get("history")
    for index, pair in enumerate([] if history is None else as_list(history, "/history")):
        at = f"/history/{index}"
        if not isinstance(pair, list) or len(pair) != 2:
            raise RowProblem(at, "must be a pair [user, assistant]")
        asked, replied = (as_text(part, f"{at}/{side}") for side, part in enumerate(pair))
        require_words(replied, f"{at}/1", "the answer")
        turns[-1:-1] = [("user", asked), ("assistant", replied)]
    return [*_system_turn(optional_text(row, "system")), *plain_turns(turns)]


def _chat(turns: list[Turn], at: str, row: dict[str, Any] | None) -> Chat:
    """The conversation, with the tools of the row if one is given."""
    return answered([], turns, at, None if row is None else read_tools(row))


def _system_turn(text: str) -> list[Turn]:
    return plain_turns([("system", text)] if text else [])


def _instruction(row: dict[str, Any], extra: str) -> str:
    """The instruction and, after a blank line, the column that goes with it."""
    parts = [as_text(row["instruction"], "/instruction"), optional_text(row, extra)]
    question = "\n\n".join(part for part in parts if part.strip())
    require_words(question, "/instruction", "the instruction")
    return question


def _answer(row: dict[str, Any], column: str) -> str:
    text = as_text(row[column], f"/{column}")
    require_words(text, f"/{column}", "the answer")
    return text
