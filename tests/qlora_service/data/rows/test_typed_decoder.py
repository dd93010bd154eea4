from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from qlora_service.data.rows.cells import Notes
from qlora_service.data.rows.conversation import OPENAI, REASONING_KEYS, SHAREGPT, TRAINING_KEYS, UNUSED_KEYS
from qlora_service.data.rows.examples import Shape
from qlora_service.data.rows.shapes import COLUMNS, REQUIRED, RowProblem, to_example
from qlora_service.data.rows.typed_decoder import count_if_all_usable

USER = {"role": "user", "content": ""}
ANSWER = {"role": "assistant", "content": "Ja"}
HUMAN = {"from": "human", "value": "Geht das?"}
GPT = {"from": "gpt", "value": "Ja"}

CERTAINLY_USABLE: list[tuple[Shape, dict[str, Any]]] = [
    ("messages", {"messages": [USER, ANSWER], "id": 7, "score": 0.5}),
    ("messages", {"messages": [{"role": "system", "content": "a"}, USER, {**ANSWER, "weight": 1}], "tools": None}),
    ("messages", {"messages": [USER, ANSWER, USER, ANSWER], "tools": [{"type": "function"}]}),
    ("messages", {"messages": [{"role": "tool", "content": "a", "tool_call_id": "b"}, ANSWER]}),
    ("sharegpt", {"conversations": [HUMAN, GPT], "system": ""}),
    ("alpaca", {"instruction": "a", "input": "", "output": "b"}),
    ("dolly", {"instruction": "a", "context": None, "response": "b", "category": "c"}),
    ("prompt_completion", {"prompt": "", "completion": "a"}),
    ("prompt_completion", {"prompt": "[INST] a [/INST]", "completion": "[{b}]", "images": []}),
    ("text", {"text": "a", "source": ["b"], "system": "c"}),
    ("preference", {"prompt": "a", "chosen": "b", "rejected": "c"}),
    ("kto", {"prompt": "a", "completion": "b", "label": False}),
    ("kto", {"messages": [USER, ANSWER], "label": True}),
]

MESSAGES_TEXT = json.dumps([{"role": "user", "content": None}])
TEXTS = ["a", "b", "c", "", " \u2003", "true", '{"name": "a"}', "[INST] a", MESSAGES_TEXT]
LISTS = [[], ["a"], [["a", "b"]], [{}], [USER], [ANSWER], [GPT], [{"function": {"parameters": "{"}}]]
CELLS = [*TEXTS, *LISTS, None, 0, 1, 1.0, True, False, {}, {"name": "a"}]
ROLES = [*OPENAI.roles, *SHAREGPT.roles, *CELLS]
CONTENTS = [*CELLS, *([{"type": "text", "text": text}] for text in ("a", "", None))]
TURN_KEYS = ("tool_calls", "function_call", "name", *TRAINING_KEYS, *REASONING_KEYS, *UNUSED_KEYS)
IN_TURNS = {"role": ROLES, "from": ROLES, "content": CONTENTS, "value": CONTENTS} | dict.fromkeys(TURN_KEYS, CELLS)


def changed_rows(row: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Copies of the row with one cell, or one cell of one turn, removed or replaced."""
    for column in COLUMNS | row.keys():
        yield {name: cell for name, cell in row.items() if name != column}
        yield from (row | {column: cell} for cell in CELLS)
    for column in row.keys() & {"messages", "conversations"}:
        turns = row[column]
        for place, (key, cells) in itertools.product(range(len(turns)), IN_TURNS.items()):
            without = {name: cell for name, cell in turns[place].items() if name != key}
            for turn in [without, *(without | {key: cell} for cell in cells), *CELLS]:
                yield row | {column: [*turns[:place], turn, *turns[place + 1 :]]}


def is_usable(row: dict[str, Any], shape: Shape) -> bool:
    """Whether the readers use all of the row."""
    notes: Notes = []
    try:
        to_example(row, shape, notes)
    except RowProblem:
        return False
    return not notes


@pytest.mark.parametrize(("shape", "row"), CERTAINLY_USABLE)
def test_changed_row_is_counted_only_if_usable_without_a_warning(shape: Shape, row: dict[str, Any]) -> None:
    counts = [(count_if_all_usable(json.dumps(other).encode(), shape), other) for other in changed_rows(row)]
    assert [other for count, other in counts if count is not None and not is_usable(other, shape)] == []
    assert {count for count, _ in counts} == {1, None}


@pytest.mark.parametrize(("shape", "row"), CERTAINLY_USABLE)
def test_ordinary_rows_of_every_shape_are_counted(shape: Shape, row: dict[str, Any]) -> None:
    line = json.dumps(row).encode() + b"\n"
    assert count_if_all_usable(line * 3, shape) == 3


def test_one_uncertain_row_leaves_all_rows_to_the_readers() -> None:
    good, bad = b'{"text": "a"}\n', b'{"text": ""}\n'
    assert count_if_all_usable(good + good, "text") == 2
    assert count_if_all_usable(good + bad + good, "text") is None


def test_conversation_of_a_preference_pair_is_not_counted() -> None:
    row = {"conversations": [HUMAN, GPT], "chosen": GPT, "rejected": GPT}
    assert not is_usable(row, "sharegpt")
    assert count_if_all_usable(json.dumps(row).encode(), "sharegpt") is None


def test_blank_lines_are_not_counted() -> None:
    assert [count_if_all_usable(b"\n \r\n", shape) for shape in REQUIRED] == [0] * len(REQUIRED)


def test_blank_answer_of_any_white_space_is_not_counted() -> None:
    blanks = [chr(code) for code in range(1, sys.maxunicode + 1) if chr(code).isspace()]
    assert len(blanks) > 20
    counts = [count_if_all_usable(json.dumps({"text": blank}).encode(), "text") for blank in blanks]
    assert counts == [None] * len(blanks)
