from __future__ import annotations

import json
from typing import Any

import pytest

from qlora_service.data.json.strict import RowProblem
from qlora_service.data.rows.cells import Notes
from qlora_service.data.rows.conversation import OPENAI, SHAREGPT, Dialect, messages_or_text, read_turn

ANSWER = {"role": "assistant", "content": "Da"}
USER = {"role": "user", "content": "Hast du Zeit?"}
CALL = {"id": "c1", "type": "function", "function": {"name": "now", "arguments": "{}"}}


def read(turn: Any, dialect: Dialect = OPENAI) -> tuple[dict[str, Any], bool, Notes]:
    notes: Notes = []
    message, trained, _ = read_turn(turn, "/messages/3", dialect, notes)
    return message, trained, notes


def problem(turn: Any, dialect: Dialect = OPENAI) -> tuple[str, str]:
    with pytest.raises(RowProblem) as caught:
        read(turn, dialect)
    return caught.value.pointer, caught.value.reason


@pytest.mark.parametrize("key", ["reasoning_content", "thinking", "reasoning"])
def test_thought_keeps_the_key_of_the_row(key: str) -> None:
    assert read({**ANSWER, key: "Hm, …"}) == ({**ANSWER, key: "Hm, …"}, True, [])
    turn = {"from": "gpt", "value": "Da", key: "Hm, …"}
    assert read(turn, SHAREGPT) == ({**ANSWER, key: "Hm, …"}, True, [])
    assert problem({**ANSWER, key: ["Hm"]}) == (f"/messages/3/{key}", "must be a string, is a list")


def test_second_thought_of_a_message_is_noted_if_it_differs() -> None:
    assert read({**ANSWER, "reasoning": "a", "thinking": "a", "reasoning_content": None})[2] == []
    message, _, notes = read({**ANSWER, "reasoning": "a", "thinking": "b"})
    assert message == {**ANSWER, "reasoning": "a", "thinking": "b"}
    assert [note.pointer for note in notes] == ["/messages/3/reasoning"]
    assert "differs from thinking" in notes[0].reason


def test_message_has_no_nulls_and_keeps_keys_that_a_template_may_read() -> None:
    nulls = dict.fromkeys(("name", "tool_calls", "function_call", "weight", "train", "thinking", "refusal", "images"))
    kept = {"name": 3, "recipient": "all", "channel": "final", "functions": [{"name": "f", "parameters": None}]}
    assert read({**ANSWER, **nulls})[0] == ANSWER
    assert read({**USER, **kept}) == ({**USER, **kept}, False, [])
    assert read({"role": "assistant", "content": None, "tool_calls": [CALL]})[0] == {
        "role": "assistant",
        "tool_calls": [CALL],
    }


@pytest.mark.parametrize(
    ("turn", "role"),
    [({"role": "tool", "tool_call_id": "c1"}, "tool"), ({**ANSWER, "content": None, "weight": 0}, "assistant")],
)
def test_untrained_tool_result_and_answer_may_have_no_content(turn: dict[str, Any], role: str) -> None:
    message, trained, notes = read(turn)
    assert (message["role"], "content" in message, trained, notes) == (role, False, False, [])


@pytest.mark.parametrize(
    ("flags", "trained"),
    [
        ({"train": False}, False),
        ({"training": False}, False),
        ({"loss": False}, False),
        ({"masked": True}, False),
        ({"weight": 0}, False),
        ({"loss_weight": 0.0}, False),
        ({"loss_scale": 0}, False),
        ({"train": True}, True),
        ({"masked": False, "loss_scale": 1.0}, True),
        ({"weight": 0, "train": False, "loss": None}, False),
    ],
)
def test_every_key_that_excludes_a_message_is_honoured(flags: dict[str, Any], trained: bool) -> None:
    assert read({**ANSWER, **flags}) == (ANSWER, trained, [])
    assert read({"from": "gpt", "value": "Da", **flags}, SHAREGPT) == (ANSWER, trained, [])


@pytest.mark.parametrize(
    ("flags", "key", "reason"),
    [
        ({"train": 0}, "train", "must be true or false"),
        ({"loss": "false"}, "loss", "must be true or false"),
        ({"loss_weight": 0.5}, "loss_weight", "must be 0 or 1"),
        ({"loss_scale": True}, "loss_scale", "must be 0 or 1"),
        ({"weight": 1, "train": False}, "train", "weight and train contradict each other: keep one of them"),
        ({"masked": True, "loss": True}, "masked", "loss and masked contradict each other: keep one of them"),
    ],
)
def test_unclear_training_key_is_a_problem(flags: dict[str, Any], key: str, reason: str) -> None:
    pointer, actual = problem({**ANSWER, **flags})
    assert pointer == f"/messages/3/{key}"
    assert actual.startswith(reason)


@pytest.mark.parametrize("flags", [{"train": True}, {"weight": 1}, {"masked": False}])
def test_message_of_another_role_is_not_trained_and_that_is_noted(flags: dict[str, Any]) -> None:
    message, trained, notes = read({**USER, **flags})
    assert (message, trained) == (USER, False)
    assert [note.pointer for note in notes] == [f"/messages/3/{next(iter(flags))}"]
    assert "only assistant messages are trained" in notes[0].reason
    assert read({**USER, "train": False, "weight": 0}) == (USER, False, [])


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("train_detail", [{"begin_offset": 0, "end_offset": 1, "train": True}], "parts of a message"),
        ("refusal", "No.", "only as the message's content"),
        ("images", ["a.png"], "only text is trained"),
        ("audio", {"id": "a"}, "only text is trained"),
    ],
)
def test_key_with_a_meaning_that_is_not_honoured_is_noted(key: str, value: Any, reason: str) -> None:
    (note,) = read({**ANSWER, key: value})[2]
    assert note.pointer == f"/messages/3/{key}"
    assert reason in note.reason
    assert read({**ANSWER, key: type(value)()})[2] == []


@pytest.mark.parametrize("role", ["system", "developer", "tool", "function", "ipython", "observation", "environment"])
def test_roles_that_templates_know_reach_them_unchanged(role: str) -> None:
    assert read({"role": role, "content": "a"}) == ({"role": role, "content": "a"}, False, [])


def test_unknown_role_reaches_the_template_with_a_note() -> None:
    message, trained, notes = read({"role": "narrator", "content": "a"})
    assert (message["role"], trained, [note.pointer for note in notes]) == ("narrator", False, ["/messages/3/role"])


@pytest.mark.parametrize(
    ("role", "meant"),
    [
        ("human", "user"),
        ("gpt", "assistant"),
        ("bot", "assistant"),
        ("Assistant", "assistant"),
        ("tool_response", "tool"),
        ("tool_call", "assistant, and the call as its tool_calls"),
    ],
)
def test_another_name_of_a_role_is_a_problem_with_advice(role: str, meant: str) -> None:
    pointer, reason = problem({"role": role, "content": "a"})
    assert pointer == "/messages/3/role"
    assert f"is {role}: write {meant}" in reason
    assert "must be one of system" in problem({"from": "narrator", "value": "a"}, SHAREGPT)[1]


def test_turn_may_be_json_text() -> None:
    assert read(json.dumps({**ANSWER, "weight": 0})) == (ANSWER, False, [])
    assert problem("Da") == ("/messages/3", "must be an object, is a string")
    assert problem('{"role": }')[1].startswith("not valid JSON")


@pytest.mark.parametrize(
    "cell",
    [
        "[INST] a [/INST]",
        '{"name": "Ann"}',
        '[{"name": "Ann"}]',
        '[{"role": "admin", "content": "a"}]',
        '[{"role": "user", "content": "a"}',
        "[]",
        "{}",
        " ",
        "",
        '"role"',
        None,
        3,
    ],
)
def test_text_that_is_not_of_messages_stays_text(cell: Any) -> None:
    assert messages_or_text(cell) is cell


@pytest.mark.parametrize("value", [[USER, ANSWER], [{"role": "assistant", "tool_calls": [CALL]}], ANSWER])
def test_json_text_of_messages_is_read(value: Any) -> None:
    assert messages_or_text("\n " + json.dumps(value)) == value
