from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_service.data.files.checks import check_dataset, read_examples
from qlora_service.data.rows.examples import Chat, Completion, LabeledAnswer, Preference, documents
from qlora_service.data.rows.shapes import RowProblem, to_example

SHARED = Path(__file__).parents[5] / "shared" / "data" / "dpo_en_demo.json"
SYSTEM = {"role": "system", "content": "Be brief."}
USER = {"role": "user", "content": "Capital of France?"}
GOOD = {"role": "assistant", "content": "Paris."}
BAD = {"role": "assistant", "content": "Lyon."}
TOOL = {"type": "function", "function": {"name": "now", "parameters": {"type": "object"}}}
CALL = {"type": "function", "function": {"name": "now", "arguments": "{}"}}


def pair(value: dict[str, Any]) -> Preference:
    example = to_example(value, "preference")
    assert isinstance(example, Preference)
    return example


def labeled(value: dict[str, Any]) -> LabeledAnswer:
    example = to_example(value, "kto")
    assert isinstance(example, LabeledAnswer)
    return example


def chats(*prompt: dict[str, Any], tools: Any = None) -> Preference:
    """The pair of the good and the bad answer to the prompt; only the answers are trained."""
    trained = (False,) * len(prompt) + (True,)
    return Preference(Chat((*prompt, GOOD), trained, tools), Chat((*prompt, BAD), trained, tools))


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ({"prompt": "Capital? ", "chosen": "Paris.", "rejected": "Lyon."}, "texts"),
        ({"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}, chats(USER)),
        ({"prompt": [USER], "chosen": "Paris.", "rejected": BAD}, chats(USER)),
        ({"prompt": "Capital of France?", "chosen": [GOOD], "rejected": [BAD]}, chats(USER)),
        ({"prompt": [USER, BAD, USER], "chosen": [GOOD], "rejected": [BAD]}, chats(USER, BAD, USER)),
        ({"chosen": [SYSTEM, USER, GOOD], "rejected": [SYSTEM, USER, BAD]}, chats(SYSTEM, USER)),
        ({"chosen": [USER, BAD, USER, GOOD], "rejected": [USER, BAD, USER, BAD]}, chats(USER, BAD, USER)),
        ({"prompt": "Capital of France?", "chosen": [USER, GOOD], "rejected": [USER, BAD]}, chats(USER)),
        ({"prompt": None, "chosen": [USER, GOOD], "rejected": [USER, BAD]}, chats(USER)),
        (
            {
                "conversations": [{"from": "human", "value": "Capital of France?"}],
                "chosen": {"from": "gpt", "value": "Paris."},
                "rejected": {"from": "gpt", "value": "Lyon."},
                "system": "Be brief.",
            },
            chats(SYSTEM, USER),
        ),
        ({"conversations": [USER], "chosen": "Paris.", "rejected": "Lyon."}, chats(USER)),
        (
            {"instruction": "Capital of", "input": "", "chosen": "Paris.", "rejected": "Lyon."},
            chats({"role": "user", "content": "Capital of"}),
        ),
        (
            {
                "instruction": "Capital of",
                "input": "France?",
                "history": [["Capital of France?", "Lyon."]],
                "system": "Be brief.",
                "chosen": "Paris.",
                "rejected": "Lyon.",
            },
            chats(SYSTEM, USER, BAD, {"role": "user", "content": "Capital of\n\nFrance?"}),
        ),
        (
            {
                "input": {"messages": [SYSTEM, USER], "tools": [TOOL], "parallel_tool_calls": True},
                "preferred_output": [GOOD],
                "non_preferred_output": [BAD],
            },
            chats(SYSTEM, USER, tools=(TOOL,)),
        ),
        (
            {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD], "tools": json.dumps([TOOL])},
            chats(USER, tools=(TOOL,)),
        ),
    ],
)
def test_every_form_of_a_pair_is_read(value: dict[str, Any], expected: Any) -> None:
    if expected == "texts":
        expected = Preference(Completion("Capital? ", "Paris."), Completion("Capital? ", "Lyon."))
    assert pair(value) == expected


def test_answer_may_call_tools_and_continue() -> None:
    answer = [{"role": "assistant", "tool_calls": [CALL]}, {"role": "tool", "content": "12:00"}, GOOD]
    chosen = pair({"prompt": [USER], "chosen": answer, "rejected": [BAD]}).chosen
    assert isinstance(chosen, Chat)
    assert chosen.trained == (False, True, False, True)


@pytest.mark.parametrize(
    ("value", "pointer", "reason"),
    [
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "/rejected", "the same answer as /chosen"),
        ({"prompt": [USER], "chosen": [GOOD], "rejected": "Paris."}, "/rejected", "the same answer as /chosen"),
        ({"chosen": [USER, GOOD], "rejected": [USER, GOOD]}, "/rejected", "the same answer as /chosen"),
        ({"prompt": "a", "chosen": "b", "rejected": None}, "/rejected", "the answer is missing"),
        ({"prompt": "a", "chosen": "", "rejected": "b"}, "/chosen", "the answer is missing"),
        ({"prompt": "a", "chosen": "b", "rejected": " \n"}, "/rejected", "the answer is empty"),
        ({"prompt": [USER], "chosen": [], "rejected": [BAD]}, "/chosen", "the answer is missing"),
        (
            {"prompt": [USER], "chosen": [{"role": "assistant", "content": ""}], "rejected": [BAD]},
            "/chosen/0/content",
            "the answer is empty",
        ),
        ({"prompt": [USER], "chosen": [GOOD], "rejected": [USER]}, "/rejected/0", "this message has the role user"),
        ({"prompt": [USER], "chosen": USER, "rejected": BAD}, "/chosen", "this message has the role user"),
        (
            {"prompt": [USER], "chosen": [GOOD, USER, GOOD], "rejected": BAD},
            "/chosen/1",
            "this message has the role user",
        ),
        (
            {"chosen": [USER, GOOD], "rejected": [USER, BAD, SYSTEM]},
            "/rejected/2",
            "this message has the role system",
        ),
        ({"prompt": [USER], "chosen": [{**GOOD, "weight": 0}], "rejected": BAD}, "/chosen", "no assistant message"),
        ({"prompt": [USER], "chosen": 3, "rejected": BAD}, "/chosen", "must be a list, is a number"),
        ({"prompt": 3, "chosen": "a", "rejected": "b"}, "/prompt", "must be a list, is a number"),
        ({"chosen": "Paris.", "rejected": "Lyon."}, "/prompt", "the prompt is missing"),
        ({"chosen": [GOOD], "rejected": [BAD]}, "/rejected", "the two conversations share no prompt"),
        ({"chosen": [USER, GOOD], "rejected": [USER, GOOD, BAD]}, "/chosen", "the answer is missing"),
        ({"chosen": ["a"], "rejected": ["b"]}, "/chosen/0", "must be an object"),
        (
            {
                "conversations": [{"from": "human", "value": "a"}],
                "chosen": {"from": "human", "value": "b"},
                "rejected": "c",
            },
            "/chosen",
            "this message has the role user",
        ),
        (
            {"input": "a", "preferred_output": [GOOD], "non_preferred_output": [BAD]},
            "/input",
            "must be an object with messages, is a string",
        ),
        ({"input": {}, "preferred_output": [GOOD], "non_preferred_output": [BAD]}, "/input/messages", "must be a list"),
        (
            {"input": {"messages": [USER], "tools": {}}, "preferred_output": [GOOD], "non_preferred_output": [BAD]},
            "/input/tools",
            "must be a list",
        ),
        (
            {"input": {"messages": [USER]}, "preferred_output": [GOOD], "non_preferred_output": []},
            "/non_preferred_output",
            "the answer is missing",
        ),
        ({"prompt": "a", "completion": "b"}, "", "this row has the shape prompt_completion"),
    ],
)
def test_unusable_pair_is_a_problem_at_its_pointer(value: dict[str, Any], pointer: str, reason: str) -> None:
    with pytest.raises(RowProblem) as caught:
        to_example(value, "preference")
    assert (caught.value.pointer, reason in caught.value.reason) == (pointer, True), caught.value.reason


@pytest.mark.parametrize("label", [True, "true", " True ", "TRUE"])
def test_label_is_a_boolean_or_its_name(label: Any) -> None:
    answer = Completion("a", "b")
    assert labeled({"prompt": "a", "completion": "b", "label": label}) == LabeledAnswer(answer, True)
    assert labeled({"prompt": "a", "completion": "b", "label": False}) == LabeledAnswer(answer, False)


def test_only_the_last_answer_of_a_labeled_conversation_is_trained() -> None:
    value = {"messages": [USER, BAD, USER, GOOD], "label": "false", "tools": [TOOL]}
    expected = Chat((USER, BAD, USER, GOOD), (False, False, False, True), (TOOL,))
    assert labeled(value) == LabeledAnswer(expected, False)


def test_labeled_answer_may_be_a_list_of_messages() -> None:
    value = {"prompt": [USER, BAD, USER], "completion": [GOOD], "label": True, "messages": None}
    expected = Chat((USER, BAD, USER, GOOD), (False, False, False, True))
    assert labeled(value) == LabeledAnswer(expected, True)


@pytest.mark.parametrize(
    ("value", "pointer", "reason"),
    [
        ({"prompt": "a", "completion": "b", "label": 1}, "/label", "must be true or false, is a number"),
        ({"prompt": "a", "completion": "b", "label": "good"}, "/label", "must be true or false, is a string"),
        ({"prompt": "a", "completion": "b", "label": None}, "/label", "is null"),
        ({"prompt": "a", "completion": " ", "label": True}, "/completion", "the answer is empty"),
        ({"prompt": "a", "completion": "b"}, "", "has the shape prompt_completion, the dataset has the shape kto"),
        ({"messages": [USER, GOOD, USER], "label": True}, "/messages", "must end with the assistant message"),
        ({"messages": [], "label": True}, "/messages", "must end with the assistant message"),
        ({"messages": [USER, {**GOOD, "weight": 0}], "label": True}, "/messages", "no assistant message to train"),
    ],
)
def test_unusable_labeled_row_is_a_problem_at_its_pointer(value: dict[str, Any], pointer: str, reason: str) -> None:
    with pytest.raises(RowProblem) as caught:
        to_example(value, "kto")
    assert (caught.value.pointer, reason in caught.value.reason) == (pointer, True), caught.value.reason


CELLS = st.recursive(
    st.none() | st.booleans() | st.integers(-1, 1) | st.sampled_from(["", " ", "a", "{}", "true"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.fixed_dictionaries(
            {"role": st.sampled_from(["user", "assistant", "tool", "x"]), "content": inner}, optional={"weight": inner}
        )
    ),
    max_leaves=6,
)
COLUMNS = ("prompt", "conversations", "instruction", "input", "system", "history", "tools")


@given(st.dictionaries(st.sampled_from(COLUMNS), CELLS), CELLS, CELLS, st.booleans())
def test_any_cells_are_a_pair_with_trained_answers_or_a_problem(
    columns: dict[str, Any], chosen_cell: Any, rejected_cell: Any, as_openai: bool
) -> None:
    names = ("preferred_output", "non_preferred_output") if as_openai else ("chosen", "rejected")
    try:
        answers = dict(zip(names, (chosen_cell, rejected_cell), strict=True))
        example = to_example({"input": None} | columns | answers, "preference")
    except RowProblem:
        return
    chosen, rejected = documents(example)
    assert chosen != rejected
    for side in (chosen, rejected):
        if isinstance(side, Chat):
            roles = {m["role"] for m, trained in zip(side.messages, side.trained, strict=True) if trained}
            assert roles == {"assistant"}


@pytest.mark.skipif(not SHARED.is_file(), reason=f"no {SHARED.name} in ../shared/data")
def test_all_pairs_of_llama_factory_are_usable() -> None:
    report = check_dataset(SHARED)
    assert (report.shape, report.rows, report.usable_rows) == ("preference", 300, 300)
    first = next(read_examples(SHARED, "json", "preference")).example
    assert isinstance(first, Preference)
    assert isinstance(first.chosen, Chat)
    assert first.chosen.messages[-1]["content"].startswith("That sounds like a fun and engaging idea!")
