"""Readers of rows with rated answers: preference pairs, and answers labeled desirable or undesirable."""

from __future__ import annotations

from typing import Any

from qlora_service.data.json.strict import RowProblem
from qlora_service.data.rows.cells import (
    Notes,
    as_text,
    json_cell,
    json_type_name,
    require_not_blank,
)
from qlora_service.data.rows.chat_options import ChatOptions, read_options
from qlora_service.data.rows.conversation import (
    OPENAI,
    SHAREGPT,
    TOOL_ROLES,
    Dialect,
    Turn,
    messages_or_text,
    plain_turn,
    read_turn,
    read_turns,
    said,
)
from qlora_service.data.rows.examples import Chat, Completion, LabeledAnswer, Preference
from qlora_service.data.rows.supervised import alpaca_prompt, chat_with_answer, read_prompt_completion, sharegpt_turns

_LABELS = {"true": True, "false": False}


def as_label(value: Any) -> bool | None:
    """The label in a cell: a boolean, or its name where the container has only strings; None for any other value.

    0 and 1 are not labels: a column `label` of numbers more often contains classes or ratings, and an answer trained
    with the wrong sign is noticed too late.
    """
    if isinstance(value, str):
        return _LABELS.get(value.strip().lower())
    return value if isinstance(value, bool) else None


def read_labeled_answer(row: dict[str, Any], notes: Notes) -> LabeledAnswer:
    desirable = as_label(row["label"])
    if desirable is None:
        raise RowProblem("/label", f"must be true or false, is {json_type_name(row['label'])}")
    messages = json_cell(row, "messages")
    if messages is None:
        return LabeledAnswer(read_prompt_completion(row, notes), desirable)
    turns = read_turns(messages, "/messages", OPENAI, notes)
    if not turns or turns[-1].message["role"] != "assistant":
        raise RowProblem("/messages", "must end with the assistant message that the label refers to")
    options = read_options(row, notes)
    return LabeledAnswer(chat_with_answer(turns[:-1], turns[-1:], "/messages", options), desirable)


def read_preference(row: dict[str, Any], notes: Notes) -> Preference:
    """The preference pair of a row in OpenAI's, TRL's, ShareGPT's or Alpaca's form."""
    chosen, rejected = ("chosen", "rejected") if "chosen" in row else ("preferred_output", "non_preferred_output")
    for column in (chosen, rejected):
        if row.get(column) in (None, "", [], {}):
            raise RowProblem(f"/{column}", "the answer is missing")
    row = row | {column: messages_or_text(row.get(column)) for column in ("prompt", chosen, rejected)}
    read_pair = _openai_pair if chosen == "preferred_output" else _pair
    pair = read_pair(row, chosen, rejected, notes)
    if _answer_content(pair.chosen) == _answer_content(pair.rejected):
        raise _same_answer(chosen, rejected)
    return pair


def _openai_pair(row: dict[str, Any], chosen: str, rejected: str, notes: Notes) -> Preference:
    """The pair in OpenAI's form, whose column `input` is an object with the prompt and the tools."""
    request = json_cell(row, "input")
    if not isinstance(request, dict):
        raise RowProblem("/input", f"must be an object with messages, is {json_type_name(request)}")
    prompt = read_turns(json_cell(request, "messages", "/input"), "/input/messages", OPENAI, notes)
    of_row, of_request = read_options(row, notes), read_options(request, notes, "/input")
    options = ChatOptions(
        tools=of_request.tools or of_row.tools,
        documents=of_request.documents or of_row.documents,
        template_arguments=of_request.template_arguments or of_row.template_arguments,
    )
    return Preference(
        _chat(row, chosen, prompt, OPENAI, options, notes), _chat(row, rejected, prompt, OPENAI, options, notes)
    )


def _pair(row: dict[str, Any], chosen: str, rejected: str, notes: Notes) -> Preference:
    both_text = isinstance(row[chosen], str) and isinstance(row[rejected], str)
    both_lists = isinstance(row[chosen], list) and isinstance(row[rejected], list)
    prompt_cell = row.get("prompt")
    dialect = OPENAI
    if isinstance(prompt_cell, str):
        if both_text:
            return Preference(_completion(row, chosen), _completion(row, rejected))
        # Some datasets give the prompt as text in addition to two full conversations that begin with it.
        if both_lists and row[chosen][0] == row[rejected][0]:
            return _pair_of_conversations(row, chosen, rejected, notes)
        prompt = [plain_turn("user", prompt_cell, "/prompt")]
    elif prompt_cell is not None:
        prompt = read_turns(prompt_cell, "/prompt", OPENAI, notes)
    elif json_cell(row, "conversations") is not None:
        prompt, dialect = sharegpt_turns(row, notes), SHAREGPT
    elif row.get("instruction") is not None:
        prompt = alpaca_prompt(row)
    elif both_lists:
        return _pair_of_conversations(row, chosen, rejected, notes)
    else:
        raise RowProblem(
            "/prompt",
            "the prompt is missing: add the column prompt, conversations or instruction, "
            "or give both answers as lists of messages that begin with the same prompt",
        )
    options = read_options(row, notes)
    return Preference(
        _chat(row, chosen, prompt, dialect, options, notes), _chat(row, rejected, prompt, dialect, options, notes)
    )


def _pair_of_conversations(row: dict[str, Any], chosen: str, rejected: str, notes: Notes) -> Preference:
    """The pair of two full conversations, whose common prefix is the prompt."""
    chosen_turns, rejected_turns = (
        read_turns(row[column], f"/{column}", OPENAI, notes) for column in (chosen, rejected)
    )
    common = 0
    for of_chosen, of_rejected in zip(chosen_turns, rejected_turns, strict=False):
        if said(of_chosen.message) != said(of_rejected.message):
            break
        common += 1
    if common == len(chosen_turns) == len(rejected_turns):
        raise _same_answer(chosen, rejected)
    if not common:
        raise RowProblem(
            f"/{rejected}", f"the first message differs from that of /{chosen}: the two conversations share no prompt"
        )
    for column, turns in ((chosen, chosen_turns), (rejected, rejected_turns)):
        if len(turns) == common:
            raise RowProblem(
                f"/{column}", "the answer is missing: the other conversation begins with this entire conversation"
            )
        _require_answer_roles(turns[common:], f"/{column}", common)
    prompt, options = chosen_turns[:common], read_options(row, notes)
    return Preference(
        chat_with_answer(prompt, chosen_turns[common:], f"/{chosen}", options),
        chat_with_answer(prompt, rejected_turns[common:], f"/{rejected}", options),
    )


def _chat(
    row: dict[str, Any], column: str, prompt: list[Turn], dialect: Dialect, options: ChatOptions, notes: Notes
) -> Chat:
    """The prompt with the answer in the column: a text, a message, or a list of messages."""
    answer, pointer = row[column], f"/{column}"
    if isinstance(answer, str):
        require_not_blank(answer, pointer, "the answer")
        turns = [plain_turn("assistant", answer, pointer)]
    elif isinstance(answer, dict):
        turns = [read_turn(answer, pointer, dialect, notes)]
        _require_answer_roles(turns, pointer, None)
    else:
        turns = read_turns(answer, pointer, dialect, notes)
        _require_answer_roles(turns, pointer, 0)
    return chat_with_answer(prompt, turns, pointer, options)


def _require_answer_roles(turns: list[Turn], pointer: str, first_index: int | None) -> None:
    """Raises RowProblem for a turn with a role other than assistant and the roles of tools.

    `first_index` is the index of the first turn in the list at `pointer`; None for a single message at `pointer`.
    """
    for index, turn in enumerate(turns):
        role = turn.message["role"]
        if role != "assistant" and role not in TOOL_ROLES:
            turn_pointer = pointer if first_index is None else f"{pointer}/{first_index + index}"
            raise RowProblem(
                turn_pointer, f"an answer has the role assistant or tool, this message has the role {role}"
            )


def _completion(row: dict[str, Any], column: str) -> Completion:
    answer = as_text(row[column], f"/{column}")
    require_not_blank(answer, f"/{column}", "the answer")
    return Completion(as_text(row["prompt"], "/prompt"), answer)


def _answer_content(answer: Chat | Completion) -> Any:
    return [said(message) for message in answer.messages] if isinstance(answer, Chat) else answer.completion


def _same_answer(chosen: str, rejected: str) -> RowProblem:
    return RowProblem(f"/{rejected}", f"the same answer as /{chosen}: the two answers of a pair must differ")
