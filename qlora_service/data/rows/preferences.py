"""Rows that judge answers: pairs of a better and a worse one, and answers labelled good or bad."""

from __future__ import annotations

from typing import Any

from qlora_service.data.json.strict import RowProblem
from qlora_service.data.rows.conversation import (
    OPENAI,
    SHAREGPT,
    Dialect,
    Turn,
    as_text,
    kind_of,
    plain_turns,
    read_tools,
    read_turn,
    read_turns,
    require_words,
)
from qlora_service.data.rows.examples import Chat, Completion, Labelled, Preference
from qlora_service.data.rows.supervised import alpaca_question, answered, read_prompt_completion, sharegpt_turns

Tools = tuple[dict[str, Any], ...] | None

_LABELS = {"true": True, "false": False}


def as_label(value: Any) -> bool | None:
    """The label a cell holds: a boolean, or its name where the container has only strings; None for anything else.

    0 and 1 are no labels: a column `label` of numbers holds classes or ratings more often, and an answer trained with
    the wrong sign is found too late.
    """
    if isinstance(value, str):
        return _LABELS.get(value.strip().lower())
    return value if isinstance(value, bool) else None


def read_labelled(row: dict[str, Any]) -> Labelled:
    desirable = as_label(row["label"])
    if desirable is None:
        raise RowProblem("/label", f"must be true or false, is {kind_of(row['label'])}")
    if row.get("messages") is None:
        return Labelled(read_prompt_completion(row), desirable)
    turns = read_turns(row["messages"], "/messages", OPENAI)
    if not turns or turns[-1][0]["role"] != "assistant":
        raise RowProblem("/messages", "must end with the assistant message that the label judges")
    return Labelled(answered(turns[:-1], turns[-1:], "/messages", read_tools(row)), desirable)


def read_preference(row: dict[str, Any]) -> Preference:
    """The pair of a row in OpenAI's, TRL's, ShareGPT's or Alpaca's form."""
    names = ("chosen", "rejected") if "chosen" in row else ("preferred_output", "non_preferred_output")
    for name in names:
        if row.get(name) in (None, "", [], {}):
            raise RowProblem(f"/{name}", "the answer is missing")
    pair = _openai_pair(row, *names) if names[0] == "preferred_output" else _pair(row, *names)
    if _words(pair.chosen) == _words(pair.rejected):
        raise RowProblem(f"/{names[1]}", f"the same answer as /{names[0]}: one of a pair must be better")
    return pair


def _openai_pair(row: dict[str, Any], chosen: str, rejected: str) -> Preference:
    given = row["input"]
    if not isinstance(given, dict):
        raise RowProblem("/input", f"must be an object with messages, is {kind_of(given)}")
    prompt = read_turns(given.get("messages"), "/input/messages", OPENAI)
    tools = read_tools(given, "/input")
    return Preference(_reply(row, chosen, prompt, OPENAI, tools), _reply(row, rejected, prompt, OPENAI, tools))


def _pair(row: dict[str, Any], chosen: str, rejected: str) -> Preference:
    both_text = isinstance(row[chosen], str) and isinstance(row[rejected], str)
    both_lists = isinstance(row[chosen], list) and isinstance(row[rejected], list)
    asked = row.get("prompt")
    dialect = OPENAI
    if isinstance(asked, str):
        if both_text:
            return Preference(_completion(row, chosen), _completion(row, rejected))
        # Some data sets give the question as text too, beside two whole conversations that begin with it.
        if both_lists and row[chosen][0] == row[rejected][0]:
            return _shared_beginning(row, chosen, rejected)
        prompt = plain_turns([("user", asked)])
    elif asked is not None:
        prompt = read_turns(asked, "/prompt", OPENAI)
    elif row.get("conversations") is not None:
        prompt, dialect = sharegpt_turns(row), SHAREGPT
    elif row.get("instruction") is not None:
        prompt = alpaca_question(row)
    elif both_lists:
        return _shared_beginning(row, chosen, rejected)
    else:
        raise RowProblem(
            "/prompt",
            "nothing says what was asked: add the column prompt, conversations or instruction, "
            "or give both answers as lists of messages that begin with the same prompt",
        )
    tools = read_tools(row)
    return Preference(_reply(row, chosen, prompt, dialect, tools), _reply(row, rejected, prompt, dialect, tools))


def _shared_beginning(row: dict[str, Any], chosen: str, rejected: str) -> Preference:
    """The pair of two whole conversations: what both begin with is the prompt."""
    better, worse = (read_turns(row[name], f"/{name}", OPENAI) for name in (chosen, rejected))
    alike = 0
    while alike < min(len(better), len(worse)) and better[alike][0] == worse[alike][0]:
        alike += 1
    if alike == len(better) == len(worse):
        raise RowProblem(f"/{rejected}", f"the same answer as /{chosen}: one of a pair must be better")
    if not alike:
        raise RowProblem(f"/{rejected}", f"begins with another message than /{chosen}: they share no prompt")
    for name, turns in ((chosen, better), (rejected, worse)):
        if len(turns) == alike:
            raise RowProblem(f"/{name}", "the answer is missing: the other conversation begins with all of this one")
        _require_own_words(turns[alike:], f"/{name}", alike)
    prompt, tools = better[:alike], read_tools(row)
    return Preference(
        answered(prompt, better[alike:], f"/{chosen}", tools), answered(prompt, worse[alike:], f"/{rejected}", tools)
    )


def _reply(row: dict[str, Any], name: str, prompt: list[Turn], dialect: Dialect, tools: Tools) -> Chat:
    """The conversation that ends with the answer in the column `name`: a text, a message, or a list of messages."""
    answer, at = row[name], f"/{name}"
    if isinstance(answer, str):
        require_words(answer, at, "the answer")
        turns = plain_turns([("assistant", answer)])
    elif isinstance(answer, dict):
        turns = [read_turn(answer, at, dialect)]
        _require_own_words(turns, at, None)
    else:
        turns = read_turns(answer, at, dialect)
        _require_own_words(turns, at, 0)
    return answered(prompt, turns, at, tools)


def _require_own_words(turns: list[Turn], at: str, first: int | None) -> None:
    """Raises RowProblem for a turn that no assistant and no tool wrote; `first` is the first one's place in a list."""
    for index, (message, _) in enumerate(turns):
        if message["role"] not in ("assistant", "tool"):
            place = at if first is None else f"{at}/{first + index}"
            raise RowProblem(place, f"an answer is the assistant's, this message is of the {message['role']}")


def _completion(row: dict[str, Any], name: str) -> Completion:
    answer = as_text(row[name], f"/{name}")
    require_words(answer, f"/{name}", "the answer")
    return Completion(as_text(row["prompt"], "/prompt"), answer)


def _words(answer: Chat | Completion) -> Any:
    return answer.messages if isinstance(answer, Chat) else answer.completion
