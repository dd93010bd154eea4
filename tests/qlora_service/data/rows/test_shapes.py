from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_service.data.rows.examples import Chat, Completion, Shape, Text
from qlora_service.data.rows.shapes import REQUIRED, RowProblem, detect_shape, objective_mismatch, to_example

USER = {"role": "user", "content": "Привет"}
ANSWER = {"role": "assistant", "content": "你好"}
CALL = {"id": "c1", "type": "function", "function": {"name": "now", "arguments": '{"zone": "UTC"}'}}
TOOL = {"type": "function", "function": {"name": "now", "parameters": {"type": "object"}}}


def messages(*turns: Any, **columns: Any) -> dict[str, Any]:
    return {"messages": list(turns), **columns}


def sharegpt(*turns: tuple[str, Any], **columns: Any) -> dict[str, Any]:
    return {"conversations": [{"from": role, "value": text} for role, text in turns], **columns}


def chat(value: dict[str, Any], shape: Shape) -> Chat:
    example = to_example(value, shape)
    assert isinstance(example, Chat)
    return example


@pytest.mark.parametrize(
    ("columns", "shape"),
    [
        ("messages tools", "messages"),
        ("id conversations", "sharegpt"),
        ("instruction input output text", "alpaca"),
        ("instruction context response category", "dolly"),
        ("prompt completion", "prompt_completion"),
        ("prompt prompt_id messages", "messages"),
        ("text source", "text"),
        ("instruction instances", None),
        ("prompt chosen rejected", "preference"),
        ("input preferred_output non_preferred_output", "preference"),
        ("prompt completion label", "prompt_completion"),
        ("prompt chosen", None),
        ("", None),
    ],
)
def test_shape_is_detected_by_the_columns(columns: str, shape: Shape | None) -> None:
    assert detect_shape(dict.fromkeys(columns.split())) == shape


@pytest.mark.parametrize(
    ("value", "shape"),
    [
        ({"conversations": [], "chosen": {}, "rejected": {}}, "preference"),
        ({"conversations": [], "chosen": {}, "rejected": None}, "preference"),
        ({"conversations": [], "chosen": None, "rejected": None}, "sharegpt"),
        ({"prompt": "a", "prompt_id": 1, "messages": [], "chosen": [], "rejected": []}, "preference"),
        ({"instruction": "a", "output": "", "chosen": "b", "rejected": "c"}, "preference"),
        ({"prompt": "a", "completion": "b", "label": False}, "kto"),
        ({"prompt": "a", "completion": "b", "label": "False"}, "kto"),
        ({"prompt": "a", "completion": "b", "label": 0}, "prompt_completion"),
        ({"prompt": "a", "completion": "b", "label": "positive"}, "prompt_completion"),
        ({"messages": [], "label": True}, "kto"),
        ({"messages": [], "label": None}, "messages"),
        ({"text": "a", "label": True}, "text"),
    ],
)
def test_shape_of_pairs_and_labels_is_detected_by_the_cells_too(value: dict[str, Any], shape: Shape) -> None:
    assert detect_shape(value) == shape


@pytest.mark.parametrize(
    ("objective", "shape", "advice"),
    [
        ("supervised", "messages", None),
        ("supervised", "text", None),
        ("dpo", "preference", None),
        ("orpo", "preference", None),
        ("kto", "kto", None),
        ("supervised", "preference", 'set objective.type to "dpo" or "orpo"'),
        ("kto", "preference", 'set objective.type to "dpo" or "orpo"'),
        ("supervised", "kto", 'set objective.type to "kto"'),
        ("dpo", "kto", 'set objective.type to "kto"'),
        ("orpo", "alpaca", "needs rows of the shape preference (chosen, rejected or input, preferred_output"),
        ("kto", "prompt_completion", "needs rows of the shape kto (messages, label or prompt, completion, label)"),
    ],
)
def test_objective_fits_the_rows_or_gets_advice(objective: str, shape: Shape, advice: str | None) -> None:
    misfit = objective_mismatch(objective, shape)
    assert misfit is advice if advice is None else advice in str(misfit)


def test_messages_are_kept_and_assistant_turns_trained() -> None:
    value = messages(
        {"role": "developer", "content": "Be brief."},
        {**USER, "name": "ann", "weight": None},
        {**ANSWER, "weight": 0},
        USER,
        {**ANSWER, "weight": 1, "reasoning_content": "…"},
        id=7,
        parallel_tool_calls=False,
    )
    assert chat(value, "messages") == Chat(
        messages=(
            {"role": "developer", "content": "Be brief."},
            {**USER, "name": "ann"},
            ANSWER,
            USER,
            {**ANSWER, "reasoning_content": "…"},
        ),
        trained=(False, False, False, False, True),
        tools=None,
    )


def test_untrained_answer_may_be_empty() -> None:
    empty = {"role": "assistant", "content": ""}
    assert chat(messages(USER, {**empty, "weight": 0}, ANSWER), "messages").messages == (USER, empty, ANSWER)


def test_content_parts_are_joined() -> None:
    parts = [{"type": "text", "text": "a "}, {"type": "text", "text": "b"}]
    assert chat(messages(USER, {"role": "assistant", "content": parts}), "messages").messages[1]["content"] == "a b"


@pytest.mark.parametrize("tools", [[TOOL], json.dumps([TOOL])])
def test_tool_calls_and_tools_are_kept(tools: Any) -> None:
    value = messages(
        USER,
        {"role": "assistant", "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "c1", "content": "12:00"},
        ANSWER,
        tools=tools,
    )
    example = chat(value, "messages")
    assert example.tools == (TOOL,)
    assert example.messages[1] == {"role": "assistant", "tool_calls": [CALL]}
    assert example.messages[2] == {"role": "tool", "content": "12:00", "tool_call_id": "c1"}
    assert example.trained == (False, True, False, True)


def test_older_function_call_becomes_a_tool_call() -> None:
    function = {"name": "now", "arguments": "{}"}
    value = messages(
        USER,
        {"role": "assistant", "content": None, "function_call": function},
        {"role": "function", "name": "now", "content": "12:00"},
    )
    example = chat(value, "messages")
    assert example.messages[1] == {"role": "assistant", "tool_calls": [{"type": "function", "function": function}]}
    assert example.messages[2] == {"role": "function", "name": "now", "content": "12:00"}


@pytest.mark.parametrize("tools", [None, [], "", "[]"])
def test_empty_tools_are_none(tools: Any) -> None:
    assert chat(messages(USER, ANSWER, tools=tools), "messages").tools is None


@pytest.mark.parametrize(
    ("value", "pointer", "reason"),
    [
        ({"messages": "hi"}, "/messages", "must be a list, is a string"),
        (messages(), "/messages", "no assistant message to train"),
        (messages(USER), "/messages", "no assistant message to train"),
        (messages(USER, {**ANSWER, "weight": 0}), "/messages", "no assistant message to train"),
        (messages("hi"), "/messages/0", "must be an object, is a string"),
        (messages({"content": "a"}), "/messages/0/role", "must be one of system, developer"),
        (messages({"role": "human", "content": "a"}), "/messages/0/role", "must be one of"),
        (messages({"role": ["user"], "content": "a"}), "/messages/0/role", "must be one of"),
        (messages({"role": "user"}), "/messages/0/content", "must be a string, is null or missing"),
        (messages({"role": "user", "content": 3}), "/messages/0/content", "is a number"),
        (messages(USER, {"role": "assistant", "content": " \n"}), "/messages/1/content", "the answer is empty"),
        (messages(USER, {"role": "assistant", "content": None}), "/messages/1/content", "must be a string"),
        (messages(USER, {"role": "assistant", "tool_calls": []}), "/messages/1/content", "must be a string"),
        (messages(USER, {**ANSWER, "weight": 0.5}), "/messages/1/weight", "must be 0 or 1"),
        (messages(USER, {**ANSWER, "weight": True}), "/messages/1/weight", "must be 0 or 1"),
        (messages(USER, {**ANSWER, "weight": "1"}), "/messages/1/weight", "must be 0 or 1"),
        (messages(USER, {**ANSWER, "weight": 2}), "/messages/1/weight", "must be 0 or 1"),
        (
            messages({"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image_url"}]}, ANSWER),
            "/messages/0/content/1",
            "only text",
        ),
        (messages({"role": "user", "content": [{"type": "text"}]}), "/messages/0/content/0/text", "a string"),
        (messages({**USER, "tool_calls": [CALL]}), "/messages/0/tool_calls", "only an assistant"),
        (messages({"role": "assistant", "tool_calls": "x"}), "/messages/0/tool_calls", "must be a list"),
        (messages({"role": "assistant", "tool_calls": ["x"]}), "/messages/0/tool_calls/0", "must be an object"),
        (
            messages({"role": "assistant", "tool_calls": [{"function": {"name": ""}}]}),
            "/messages/0/tool_calls/0/function",
            "must be",
        ),
        (
            messages({"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}),
            "/messages/0/tool_calls/0/function/arguments",
            "not valid JSON",
        ),
        (
            messages({"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": [1]}}]}),
            "/messages/0/tool_calls/0/function/arguments",
            "must be a JSON object",
        ),
        (messages(USER, ANSWER, tools="{"), "/tools", "not valid JSON"),
        (messages(USER, ANSWER, tools={}), "/tools", "must be a list, is an object"),
        (messages(USER, ANSWER, tools=["x"]), "/tools/0", "must be an object"),
    ],
)
def test_unusable_message_is_a_problem_at_its_pointer(value: dict[str, Any], pointer: str, reason: str) -> None:
    with pytest.raises(RowProblem) as caught:
        to_example(value, "messages")
    assert caught.value.pointer == pointer
    assert reason in caught.value.reason


def test_sharegpt_turns_become_messages() -> None:
    value = sharegpt(
        ("system", "Be brief."),
        ("human", "Time?"),
        ("function_call", '{"name": "now", "arguments": {"zone": "UTC"}}'),
        ("observation", "12:00"),
        ("gpt", "Noon."),
        tools=json.dumps([TOOL]),
    )
    call = {"type": "function", "function": {"name": "now", "arguments": {"zone": "UTC"}}}
    assert chat(value, "sharegpt") == Chat(
        messages=(
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Time?"},
            {"role": "assistant", "tool_calls": [call]},
            {"role": "tool", "content": "12:00"},
            {"role": "assistant", "content": "Noon."},
        ),
        trained=(False, False, True, False, True),
        tools=(TOOL,),
    )


def test_sharegpt_system_column_comes_first() -> None:
    example = chat(sharegpt(("human", "a"), ("gpt", "b"), system="Be brief."), "sharegpt")
    assert example.messages[0] == {"role": "system", "content": "Be brief."}
    assert example.trained == (False, False, True)


def test_conversations_may_hold_openai_messages() -> None:
    assert chat({"conversations": [USER, ANSWER]}, "sharegpt").messages == (USER, ANSWER)


@pytest.mark.parametrize(
    ("value", "pointer", "reason"),
    [
        (sharegpt(("human", "a"), ("gpt", " ")), "/conversations/1/value", "the answer is empty"),
        (sharegpt(("robot", "a")), "/conversations/0/from", "must be one of system, human"),
        (sharegpt(("human", None)), "/conversations/0/value", "must be a string"),
        (sharegpt(("human", "a")), "/conversations", "no assistant message to train"),
        (sharegpt(("function_call", "now()")), "/conversations/0/value", "not valid JSON"),
        (sharegpt(("function_call", "[]")), "/conversations/0/value", "contains no function call"),
        (sharegpt(("function_call", '"now"')), "/conversations/0/value", 'must be {"name"'),
        (sharegpt(("human", "a"), ("gpt", "b"), chosen={}, rejected={}), "/chosen", "a preference pair"),
    ],
)
def test_unusable_sharegpt_turn_is_a_problem_at_its_pointer(value: dict[str, Any], pointer: str, reason: str) -> None:
    with pytest.raises(RowProblem) as caught:
        to_example(value, "sharegpt")
    assert caught.value.pointer == pointer
    assert reason in caught.value.reason


@pytest.mark.parametrize(
    ("given_input", "question"), [("5", "Double it.\n\n5"), ("", "Double it."), (None, "Double it.")]
)
def test_alpaca_joins_instruction_and_input(given_input: str | None, question: str) -> None:
    value = {"id": 1, "instruction": "Double it.", "input": given_input, "output": "10"}
    assert chat(value, "alpaca") == Chat(
        messages=({"role": "user", "content": question}, {"role": "assistant", "content": "10"}),
        trained=(False, True),
    )


def test_answers_in_alpaca_history_are_trained() -> None:
    value = {"instruction": "c", "output": "d", "system": "s", "history": [["a", "b"], ["x", "y"]]}
    example = chat(value, "alpaca")
    assert [message["content"] for message in example.messages] == ["s", "a", "b", "x", "y", "c", "d"]
    assert example.trained == (False, False, True, False, True, False, True)


def test_dolly_joins_instruction_and_context() -> None:
    value = {"instruction": "Who?", "context": "Ann came.", "response": "Ann.", "category": "qa"}
    assert chat(value, "dolly").messages == (
        {"role": "user", "content": "Who?\n\nAnn came."},
        {"role": "assistant", "content": "Ann."},
    )


def test_prompt_and_completion_are_plain_text() -> None:
    assert to_example({"prompt": "", "completion": " b ", "id": 1}, "prompt_completion") == Completion("", " b ")


def test_prompt_and_completion_of_messages_train_only_the_completion() -> None:
    value = {"prompt": [USER, ANSWER, USER], "completion": [ANSWER]}
    example = chat(value, "prompt_completion")
    assert example == Chat((USER, ANSWER, USER, ANSWER), (False, False, False, True))


@pytest.mark.parametrize("prompt", [USER["content"], [USER]])
@pytest.mark.parametrize("completion", [ANSWER["content"], [ANSWER]])
def test_prompt_or_completion_may_be_text_beside_messages(prompt: Any, completion: Any) -> None:
    example = to_example({"prompt": prompt, "completion": completion}, "prompt_completion")
    both_text = isinstance(prompt, str) and isinstance(completion, str)
    assert example == (Completion(prompt, completion) if both_text else Chat((USER, ANSWER), (False, True)))


def test_text_is_kept_unchanged() -> None:
    assert to_example({"text": " a\n", "meta": {}}, "text") == Text(" a\n")


@pytest.mark.parametrize(
    ("shape", "value", "pointer", "reason"),
    [
        ("alpaca", {"instruction": "a", "output": " "}, "/output", "the answer is empty"),
        ("alpaca", {"instruction": "a", "output": None}, "/output", "must be a string, is null"),
        ("alpaca", {"instruction": " ", "input": "", "output": "b"}, "/instruction", "is empty"),
        ("alpaca", {"instruction": "a", "input": 3, "output": "b"}, "/input", "is a number"),
        ("alpaca", {"instruction": "a", "output": "b", "system": []}, "/system", "is a list"),
        ("alpaca", {"instruction": "a", "output": "b", "history": "x"}, "/history", "must be a list"),
        ("alpaca", {"instruction": "a", "output": "b", "history": [["x"]]}, "/history/0", "must be a pair"),
        ("alpaca", {"instruction": "a", "output": "b", "history": [["x", ""]]}, "/history/0/1", "is empty"),
        ("alpaca", {"instruction": "a", "output": "b", "history": [["x", 1]]}, "/history/0/1", "must be a string"),
        ("dolly", {"instruction": "a", "response": ""}, "/response", "the answer is empty"),
        ("dolly", {"instruction": "a", "response": True}, "/response", "is a boolean"),
        ("prompt_completion", {"prompt": 1, "completion": "b"}, "/prompt", "must be a string"),
        ("prompt_completion", {"prompt": "a", "completion": "\n"}, "/completion", "the answer is empty"),
        ("prompt_completion", {"prompt": 1, "completion": [ANSWER]}, "/prompt", "must be a list"),
        ("prompt_completion", {"prompt": [USER], "completion": 1}, "/completion", "must be a list"),
        ("prompt_completion", {"prompt": [USER], "completion": " "}, "/completion", "the answer is empty"),
        ("prompt_completion", {"prompt": [ANSWER], "completion": [USER]}, "/completion", "no assistant"),
        ("text", {"text": "\t"}, "/text", "the text is empty"),
        ("text", {"text": {}}, "/text", "is an object"),
        ("text", {"instruction": "a", "output": "b"}, "", "has the shape alpaca, the dataset has the shape text"),
        (
            "text",
            {"question": "a", "\ud800": "b"},
            "",
            r"Found: 'question', '\ud800'. Accepted: preference (chosen, rejected or input, ",
        ),
        ("text", {}, "", "Found: none."),
    ],
)
def test_unusable_row_is_a_problem_at_its_pointer(
    shape: Shape, value: dict[str, Any], pointer: str, reason: str
) -> None:
    with pytest.raises(RowProblem) as caught:
        to_example(value, shape)
    assert caught.value.pointer == pointer
    assert reason in caught.value.reason


KEYS = st.sampled_from(
    ["role", "content", "weight", "from", "value", "name", "tool_calls", "function_call", "function", "type", "text"]
)
WORDS = st.sampled_from(["user", "assistant", "gpt", "human", "function_call", "text", "{}", "", "a"])
NESTED = st.recursive(
    st.none() | st.booleans() | st.integers(-1, 2) | st.floats() | WORDS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(list(REQUIRED)), st.data())
def test_any_row_is_an_example_or_a_problem(shape: Shape, data: st.DataObject) -> None:
    columns = (*REQUIRED[shape][0], "tools", "system", "history", "input", "context")
    value = {column: data.draw(NESTED, label=column) for column in columns}
    try:
        example = to_example(value, shape)
    except RowProblem:
        return
    if isinstance(example, Chat):
        trained = [message for message, is_trained in zip(example.messages, example.trained, strict=True) if is_trained]
        assert {message["role"] for message in trained} == {"assistant"}
