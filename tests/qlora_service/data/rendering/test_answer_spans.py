"""Spans of the trained answers in the text that a chat template renders, and what the template leaves out."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest

from qlora_service.data.rendering.answer_spans import LocatedAnswers, locate_answers
from qlora_service.data.rendering.chat_template import ChatTemplate, Conversation, TemplateError

NOW = datetime(2026, 3, 1, tzinfo=UTC)
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# As in Qwen3: only the last answer has a thought, so a rendered prefix is not a prefix of the text.
THINKING = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' and loop.last %}"
    "{{ '<think>\n' + m.reasoning_content | default('') + '\n</think>\n' }}{% endif %}"
    "{{ (m.content | default('')).split('</think>')[-1].strip() }}"
    "{% for c in m.tool_calls or [] %}{{ '<call>' + c.function | tojson + '</call>' }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# As in gpt-oss: the last answer ends with another token than the earlier ones.
TWO_ENDS = (
    "{% for m in messages %}{{ '<|start|>' + m.role + '<|message|>' + m.content }}"
    "{{ '<|return|>' if loop.last and m.role == 'assistant' else '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)
# As in Gemma 4: the words of a call follow the results.
WORDS_LAST = (
    "{% for m in messages %}{% set next = messages[loop.index] | default({}) %}"
    "{% if m.role == 'user' %}{{ '<U>' + m.content }}{% elif m.role == 'assistant' %}<A>"
    "{% for c in m.tool_calls or [] %}{{ '<call>' + c.function.name + '</call>' }}{% endfor %}"
    "{% if next.role == 'tool' %}{{ '<result>' + next.content + '</result>' }}{% endif %}"
    "{{ m.content }}<end>{% endif %}{% endfor %}{% if add_generation_prompt %}<A>{% endif %}"
)
MARKS_GENERATION = (
    "{% for m in messages %}{% if m.role == 'assistant' %}A:{% generation %}{{ m.content }}</s>{% endgeneration %}"
    "{% else %}U:{{ m.content }}{% endif %}{% endfor %}"
)
# As in Hermes 3: the end of a tool's result differs when a turn follows it; and there is no rendering without tools.
LATE_RESULT_END = (
    "{% for tool in tools %}{{ tool.function.name }}{% endfor %}{% for m in messages %}"
    "{% if m.role == 'tool' %}{{ '<|im_start|>tool\n' + m.content }}"
    "{{ '</r>' if loop.last else '\n</r>\n' }}<|im_end|>"
    "{% else %}{{ '<|im_start|>' + m.role + '\n' + m.content }}"
    "{% for c in m.tool_calls or [] %}{{ '<call>' + c.function.name + '</call>' }}{% endfor %}{{ '<|im_end|>\n' }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TOOL = {"type": "function", "function": {"name": "ferry"}}


def user(content: str) -> dict[str, Any]:
    return {"role": "user", "content": content}


def answer(content: str, **keys: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **keys}


def call(name: str, **arguments: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


TWO_TURNS = [user("hi"), answer("yo"), user("and?"), answer("yo")]
CALL = [user("When?"), answer("", tool_calls=[call("ferry", pier="7")]), {"role": "tool", "content": "9:40"}]


def located(
    template: str, messages: list[dict[str, Any]], trained: list[bool] | None = None, **options: Any
) -> LocatedAnswers:
    trained = [message["role"] == "assistant" for message in messages] if trained is None else trained
    return locate_answers(ChatTemplate(template, {}, NOW), Conversation(tuple(messages), **options), trained)


def answers(template: str, messages: list[dict[str, Any]], trained: list[bool] | None = None) -> list[str]:
    """The text of each trained answer's span."""
    result = located(template, messages, trained)
    return [result.text[start:end] for start, end in result.spans]


def reasons(template: str, messages: list[dict[str, Any]], **options: Any) -> list[tuple[int | None, str, str]]:
    """The place of each warning, and its reason without the advice."""
    warnings = located(template, messages, **options).warnings
    return [(message, pointer, reason.partition(":")[0]) for message, pointer, reason in warnings]


def test_answer_is_the_text_after_the_generation_prompt() -> None:
    assert answers(CHATML, TWO_TURNS) == ["yo<|im_end|>\n", "yo<|im_end|>\n"]


def test_equal_answers_are_distinguished() -> None:
    result = located(CHATML, TWO_TURNS, [False, False, False, True])
    assert result.text[result.spans[0][0] :] == "yo<|im_end|>\n"
    assert result.spans[0][0] > result.text.index("and?")


def test_end_token_is_trained_where_earlier_turns_are_rewritten() -> None:
    assert answers(THINKING, TWO_TURNS) == ["yo<|im_end|>\n", "<think>\n\n</think>\nyo<|im_end|>\n"]
    assert answers(THINKING, TWO_TURNS, [False, True, False, False]) == ["yo<|im_end|>\n"]


def test_calls_are_trained_where_earlier_turns_are_rewritten() -> None:
    first, last = answers(THINKING, [*CALL, answer("At 9:40.")])
    assert first == '<call>{"name": "ferry", "arguments": {"pier": "7"}}</call><|im_end|>\n'
    assert last == "<think>\n\n</think>\nAt 9:40.<|im_end|>\n"


def test_call_with_words_and_a_call_without_content_are_trained() -> None:
    words = [user("When?"), answer("I look.", tool_calls=[call("ferry")]), user("And?"), answer("9:40")]
    assert answers(THINKING, words)[0] == 'I look.<call>{"name": "ferry", "arguments": {}}</call><|im_end|>\n'
    del words[1]["content"]
    assert answers(THINKING, words)[0] == '<call>{"name": "ferry", "arguments": {}}</call><|im_end|>\n'


def test_answer_ends_with_its_own_token_where_the_last_one_has_another() -> None:
    assert answers(TWO_ENDS, TWO_TURNS) == ["<|message|>yo<|end|>", "<|message|>yo<|return|>"]


@pytest.mark.parametrize("content", ["<answer><b>7</b></answer>", "**bold**", "7 < 8 > 6", "!", "😀", "[A]", "<br/>"])
def test_answers_of_any_characters_are_located(content: str) -> None:
    turns = [user("?"), answer(content), user("Again?"), answer(content)]
    assert answers(TWO_ENDS, turns) == [f"<|message|>{content}<|end|>", f"<|message|>{content}<|return|>"]
    assert answers(THINKING, turns)[0] == f"{content}<|im_end|>\n"


@pytest.mark.parametrize("character", ["\uf0b7", "\U000f0000", "\U000f0001", "\U000f0002", "\U000f1234", "\U0010fffd"])
def test_private_use_characters_are_characters_like_others(character: str) -> None:
    turns = [user(f"icon {character}"), answer(f"{character} file"), user("Again?"), answer(f"b {character}")]
    first, last = answers(THINKING, turns)
    assert first == f"{character} file<|im_end|>\n"
    assert last == f"<think>\n\n</think>\nb {character}<|im_end|>\n"


@pytest.mark.parametrize("mark", ["\U000f0001", "\U000f1234"])
def test_private_use_character_in_a_tag_is_a_character_like_others(mark: str) -> None:
    turns = [user("?"), answer(f"<{mark}> yes"), user("Again?"), answer("no")]
    assert answers(THINKING, turns)[0] == f"<{mark}> yes<|im_end|>\n"


def test_words_after_the_result_of_a_call_are_trained_without_the_result() -> None:
    turns = [user("When?"), answer("At 9:40.", tool_calls=[call("ferry")]), {"role": "tool", "content": "9:40"}]
    assert answers(WORDS_LAST, turns, [False, True, False]) == ["<call>ferry</call>", "At 9:40.<end>"]


def test_header_after_the_late_end_of_a_result_is_not_trained() -> None:
    result = located(LATE_RESULT_END, [*CALL, answer("At 9:40.")], tools=[TOOL])
    assert [result.text[start:end] for start, end in result.spans] == [
        "<call>ferry</call><|im_end|>\n",
        "At 9:40.<|im_end|>\n",
    ]


@pytest.mark.parametrize("space", ["", " ", "\n\n    "])
def test_header_in_other_white_space_than_in_the_prompt_is_not_trained(space: str) -> None:
    template = (
        "{% for m in messages %}{{ space + m.role.upper() + ': ' + m.content + '</s>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
    ).replace("space", repr(space))
    assert answers(template, TWO_TURNS) == [" yo</s>", " yo</s>"]


def test_answer_that_begins_like_the_header_is_trained_whole() -> None:
    content = "<|im_start|>assistant\nyes"
    assert answers(CHATML, [user("Repeat the header."), answer(content)]) == [content + "<|im_end|>\n"]


def test_header_in_a_generation_block_is_not_trained() -> None:
    template = (
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}<A><think></think>{{ m.content }}</A>"
        "{% endgeneration %}{% else %}<U>{{ m.content }}</U>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<A><think>{% endif %}"
    )
    assert answers(template, TWO_TURNS) == ["</think>yo</A>", "</think>yo</A>"]


def test_generation_blocks_are_the_spans() -> None:
    assert answers(MARKS_GENERATION, TWO_TURNS) == ["yo</s>", "yo</s>"]
    result = located(MARKS_GENERATION, TWO_TURNS, [False, False, False, True])
    assert result.text == "U:hiA:yo</s>U:and?A:yo</s>"
    assert result.spans == [(20, 26)]


def test_generation_blocks_survive_a_filter_around_them() -> None:
    template = "{% filter trim %}  " + MARKS_GENERATION + "{% endfilter %}"
    assert answers(template, TWO_TURNS) == ["yo</s>", "yo</s>"]


def test_nothing_of_an_answer_that_a_template_omits_is_trained() -> None:
    template = "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}"
    result = located(template, TWO_TURNS)
    assert (result.text, result.spans) == ("hiand?", [])
    assert [index for index, *_ in result.warnings] == [1, 3]


@pytest.mark.parametrize(
    "part", ["{{ m.content | length }}", "{{ m.content | reverse }}{% if 'yo' in m.content %}!{% endif %}"]
)
def test_answer_in_a_text_that_depends_on_its_letters_is_not_guessed(part: str) -> None:
    template = "{% for m in messages %}" + part + "{% if m.content == 'yo' %}?{% endif %};{% endfor %}x"
    with pytest.raises(TemplateError, match="which part"):
        answers(template, TWO_TURNS, [False, True, False, False])


def test_dropped_call_is_a_warning_and_its_empty_answer_is_not_trained() -> None:
    turns = [*CALL, answer("At 9:40.")]
    assert answers(CHATML, turns) == ["At 9:40.<|im_end|>\n"]
    assert answers(CHATML, CALL[:2]) == []
    assert reasons(CHATML, turns, tools=[TOOL]) == [
        (1, "/tool_calls/0/function/name", "the chat template leaves out the tool call, which is not trained"),
        (
            1,
            "/tool_calls/0/function/arguments",
            "the chat template leaves out the arguments of the tool call, which is not trained",
        ),
        (None, "/tools/0", "the chat template does not render this tool"),
    ]


def test_tool_that_only_a_call_names_is_not_rendered() -> None:
    template = THINKING.replace("{% for m", "{% set has_tools = tools | length %}{% for m", 1)
    assert (None, "/tools/0", "the chat template does not render this tool") in reasons(template, CALL, tools=[TOOL])
    rendered = "{{ tools | tojson }}" + THINKING
    assert reasons(rendered, CALL, tools=[TOOL]) == []


@pytest.mark.parametrize("thought", [{"content": "<think>one</think>2"}, {"content": "2", "reasoning_content": "one"}])
def test_thought_left_out_of_an_earlier_answer_is_a_warning(thought: dict[str, str]) -> None:
    turns = [user("1+1?"), {"role": "assistant", **thought}, user("+1?"), answer("3", reasoning_content="two")]
    assert answers(THINKING, turns)[0] == "2<|im_end|>\n"
    ((message, _, reason),) = located(THINKING, turns).warnings
    assert (message, reason.split(",")[0]) == (1, "the chat template leaves out the thought in the message")


def test_message_that_the_model_does_not_see_is_a_warning() -> None:
    template = CHATML.replace("in messages", "in messages if m.role != 'system'")
    turns = [{"role": "system", "content": "Be brief."}, *TWO_TURNS]
    assert reasons(template, turns) == [
        (0, "/content", "the chat template leaves out the message, which the model does not see")
    ]


def test_documents_and_variables_that_change_nothing_are_warnings() -> None:
    options: dict[str, Any] = {"documents": [{"text": "Piers"}], "arguments": {"enable_thinking": False}}
    assert [pointer for _, pointer, _ in reasons(CHATML, TWO_TURNS, **options)] == [
        "/documents/0",
        "/chat_template_kwargs/enable_thinking",
    ]
    reading = "{{ documents[0].text }}{% if enable_thinking %}?{% endif %}" + CHATML
    assert reasons(reading, TWO_TURNS, **options) == []
