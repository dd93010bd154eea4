"""Rows of every kind of conversation, as a user would send them."""

# ruff: noqa: RUF001 - full-width characters are meant

from __future__ import annotations

import json
from typing import Any

Row = dict[str, Any]
Message = dict[str, Any]

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather in a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "description": "Name of the city"}},
            "required": ["city"],
        },
    },
}
PLAN = {
    "type": "function",
    "function": {
        "name": "plan_trip",
        "description": "Plans a trip",
        "parameters": {
            "type": "object",
            "properties": {
                "stops": {"type": "array", "items": {"type": "string"}, "description": "Cities in order"},
                "options": {"type": "object", "description": "Options", "properties": {"fast": {"type": "boolean"}}},
                "days": {"type": "integer", "description": "Length"},
            },
            "required": ["stops"],
        },
    },
}
CLOCK = {
    "type": "function",
    "function": {"name": "read_clock", "description": "The time", "parameters": {"type": "object", "properties": {}}},
}
NESTED = {
    "stops": ["Rome", "São Paulo", "東京"],
    "options": {"fast": True, "notes": {"text": 'say "hi"\nthen go', "price": 1.5}},
    "days": 3,
}
THOUGHT = "The user wants a sum: one and one."
INLINE = "<think>\n{}\n</think>\n\n{}"


def user(content: Any) -> Message:
    return {"role": "user", "content": content}


def answer(content: Any, **keys: Any) -> Message:
    return {"role": "assistant", "content": content, **keys}


def result(content: str, name: str = "get_weather", **keys: Any) -> Message:
    return {"role": "tool", "name": name, "content": content, **keys}


def call(arguments: Any, name: str = "get_weather", **keys: Any) -> dict[str, Any]:
    return {**keys, "type": "function", "function": {"name": name, "arguments": arguments}}


def row(*messages: Message, **columns: Any) -> Row:
    return {"messages": list(messages), **columns}


def conversations() -> dict[str, Row]:
    """A row of each kind by the kind's name. The texts before answers are unlike any other text of their row."""
    return {**_plain(), **_calls(), **_more_calls(), **_thoughts(), **_texts(), **_settings()}


def _plain() -> dict[str, Row]:
    system = {"role": "system", "content": "You answer in one sentence."}
    first, second = user("What is the capital of France?"), user("And that of Italy?")
    return {
        "plain": row(first, answer("It is Paris.")),
        "system": row(system, first, answer("It is Paris.")),
        "several turns": row(first, answer("It is Paris."), second, answer("That is Rome!")),
        "three turns, system": row(
            system, first, answer("It is Paris."), second, answer("Rome."), user("Thanks a lot!"), answer("Welcome.")
        ),
        "same answer twice": row(first, answer("Yes."), second, answer("Yes.")),
        "answer repeats the question": row(user("Say this."), answer("Say this.")),
        "last turn is the user's": row(first, answer("It is Paris."), second),
        "two answers in a row": row(first, answer("It is Paris."), answer("On the Seine.")),
        "weight 0, then 1": row(first, answer("It is Lyon.", weight=0), second, answer("That is Rome.", weight=1)),
        "weight 0 on the last turn": row(first, answer("It is Paris."), second, answer("That is Milan.", weight=0)),
        "weight 0, same answers": row(first, answer("Yes.", weight=0), second, answer("Yes.")),
    }


def _calls() -> dict[str, Row]:
    question, paris, sunny = user("How is the weather in Paris?"), call({"city": "Paris"}), result("sunny, 21 degrees")
    final, tools = answer("It is sunny in Paris."), [WEATHER]
    both = [paris, call({"city": "Rome"})]
    return {
        "tools without a call": row(question, answer("I do not know."), tools=tools),
        "call, empty content": row(question, answer("", tool_calls=[paris]), sunny, final, tools=tools),
        "call, null content": row(question, answer(None, tool_calls=[paris]), sunny, final, tools=tools),
        "call, content missing": row(
            question, {"role": "assistant", "tool_calls": [paris]}, sunny, final, tools=tools
        ),
        "call with words": row(question, answer("Let me look.", tool_calls=[paris]), sunny, final, tools=tools),
        "call with ids": row(
            question,
            answer("", tool_calls=[call({"city": "Paris"}, id="call_1")]),
            {"role": "tool", "tool_call_id": "call_1", "content": "sunny, 21 degrees"},
            final,
            tools=tools,
        ),
        "parallel calls": row(question, answer("", tool_calls=both), sunny, result("rain, 9"), final, tools=tools),
        "parallel calls with words": row(
            question, answer("Both, then.", tool_calls=both), sunny, result("rain, 9"), final, tools=tools
        ),
        "two tool rounds": row(
            question, answer("", tool_calls=[paris]), sunny, answer("", tool_calls=both[1:]), result("rain, 9"), final,
            tools=tools,
        ),
        "calls in several turns": row(
            question, answer("", tool_calls=[paris]), sunny, final,
            user("Then what about Rome?"), answer("", tool_calls=both[1:]), result("rain, 9"), answer("Rome has rain."),
            tools=tools,
        ),
        "last turn is a call": row(question, answer("", tool_calls=[paris]), tools=tools),
        "last turn is a call, null content": row(question, answer(None, tool_calls=[paris]), tools=tools),
        "last turn is two calls": row(question, answer("", tool_calls=both), tools=tools),
        "last turn is a result": row(question, answer("", tool_calls=[paris]), sunny, tools=tools),
        "weight 0 on a call": row(question, answer("", tool_calls=[paris], weight=0), sunny, final, tools=tools),
        "weight 0 after a call": row(
            question, answer("", tool_calls=[paris]), sunny, answer("It is sunny in Paris.", weight=0), tools=tools
        ),
    }  # fmt: skip


def _more_calls() -> dict[str, Row]:
    question, done = user("Plan my trip to Rome and Tokyo."), answer("The trip is planned.")
    planned, text = result("planned for monday", "plan_trip"), json.dumps({"city": "Paris"})
    return {
        "arguments as text": row(
            user("How is the weather in Paris?"), answer("", tool_calls=[call(text)]), result("sunny, 21 degrees"),
            answer("It is sunny in Paris."), tools=[WEATHER],
        ),
        "arguments as text, null content": row(
            user("How is the weather in Paris?"), answer(None, tool_calls=[call(text)]), tools=[WEATHER]
        ),
        "nested arguments": row(
            question, answer("", tool_calls=[call(NESTED, "plan_trip")]), planned, done, tools=[PLAN]
        ),
        "nested arguments as text": row(
            question, answer("", tool_calls=[call(json.dumps(NESTED, ensure_ascii=False), "plan_trip")]), planned, done,
            tools=[PLAN],
        ),
        "no arguments": row(
            user("What time is it now?"), answer("", tool_calls=[call({}, "read_clock")]),
            result("five past nine", "read_clock"), answer("It is 9:05."), tools=[CLOCK],
        ),
        "several tools, one called": row(
            question, answer("", tool_calls=[call({"stops": ["Rome"]}, "plan_trip")]), planned, done,
            tools=[WEATHER, PLAN, CLOCK],
        ),
        "call without tools": row(
            user("How is the weather in Paris?"), answer("", tool_calls=[call({"city": "Paris"})]),
            result("sunny, 21 degrees"), answer("It is sunny in Paris."),
        ),
        "call, then words, not in one turn": row(
            user("How is the weather in Paris?"), answer("Let me look."),
            answer("", tool_calls=[call({"city": "Paris"})]), result("sunny, 21 degrees"), answer("Sunny."),
            tools=[WEATHER],
        ),
    }  # fmt: skip


def _thoughts() -> dict[str, Row]:
    first, second = user("How much is one and one?"), user("Now add another one.")
    question, called = user("How is the weather in Paris?"), [call({"city": "Paris"})]
    rows: dict[str, Row] = {}
    for key in ("reasoning_content", "thinking", "reasoning"):
        rows[f"thought in {key}"] = row(first, answer("It is 2.", **{key: THOUGHT}))
        rows[f"thoughts in {key}"] = row(
            first, answer("It is 2.", **{key: THOUGHT}), second, answer("It is 3.", **{key: "Two and one."})
        )
    one, two = INLINE.format(THOUGHT, "It is 2."), INLINE.format("Two and one.", "It is 3.")
    rounds = (question, answer("", reasoning_content="I must look.", tool_calls=called), result("sunny, 21 degrees"))
    return rows | {
        "inline thought": row(first, answer(one)),
        "inline thoughts": row(first, answer(one), second, answer(two)),
        "thought in an earlier turn": row(first, answer("It is 2.", reasoning_content=THOUGHT), second, answer("3.")),
        "inline thought in an earlier turn": row(first, answer(one), second, answer("It is 3.")),
        "empty thought": row(first, answer("It is 2.", reasoning_content="")),
        "null keys": row(first, answer("It is 2.", reasoning_content=None, tool_calls=None, name=None)),
        "thought with line breaks": row(first, answer("\nIt is 2.\n", reasoning_content=f"\n{THOUGHT}\n\nSo two.\n")),
        "thought with a call": row(*rounds, answer("Sunny.", reasoning_content="So it is."), tools=[WEATHER]),
        "thought only with the call": row(*rounds, answer("Sunny."), tools=[WEATHER]),
        "thought, words and a call": row(
            question, answer("Let me look.", reasoning_content="I must look.", tool_calls=called),
            result("sunny, 21 degrees"), answer("Sunny."), tools=[WEATHER],
        ),
        "thought with a last call": row(*rounds[:2], tools=[WEATHER]),
        "inline thought with a call": row(
            question, answer(INLINE.format("I must look.", ""), tool_calls=called), result("sunny, 21 degrees"),
            answer("Sunny."), tools=[WEATHER],
        ),
        "thoughts with calls in several turns": row(
            *rounds, answer("Sunny.", reasoning_content="So it is."), user("Then what about Rome?"),
            answer("", reasoning_content="Again.", tool_calls=[call({"city": "Rome"})]), result("rain, 9"),
            answer("Rome has rain.", reasoning_content="It rains."), tools=[WEATHER],
        ),
        "weight 0 on a thought": row(
            first, answer("It is 5.", reasoning_content="Guess.", weight=0), second,
            answer("It is 3.", reasoning_content="Two and one."),
        ),
    }  # fmt: skip


def _texts() -> dict[str, Row]:
    code = "Use a loop:\n\n```python\nfor i in range(3):\n    print(i)\n```\n\n- **one**\n- two\n"
    tags = "<answer><b>bold</b> &amp; <tool>none</tool></answer>"
    return {
        "non-Latin text": row(
            user("你好，请介绍一下你自己。"), answer("你好，我是助手。مرحبا"), user("और हिन्दी?"), answer("नमस्ते दुनिया")
        ),
        "emoji": row(user("Only emoji, please."), answer("😀👩‍👩‍👧🇩🇪"), user("Again, please."), answer("👍🏽 ok")),
        "punctuation only": row(user("Is it true?"), answer("!"), user("Really true?"), answer("…")),
        "one-letter answers": row(user("Choose A or B."), answer("A"), user("Choose C or D."), answer("D")),
        "white space around answers": row(
            user("Write with space."), answer("  \n\nindented\n\n "), user("And a tab."), answer("\tx\t")
        ),
        "markdown and code": row(user("Show me a loop."), answer(code), user("Shorter, please."), answer("`i`")),
        "tags like XML": row(user("Answer in tags."), answer(tags), user("Once more, please."), answer("<br/>")),
        "JSON like a call": row(
            user("Write a call."), answer('{"name": "get_weather", "arguments": {"city": "Paris"}}')
        ),
        "answers with role names": row(
            user("Name the roles."), answer("user\nassistant\nmodel"), user("Repeat one."), answer("assistant")
        ),
        "text in parts": row(
            user([{"type": "text", "text": "What is the capital of France?"}]),
            answer([{"type": "text", "text": "It is Paris."}]),
        ),
    }


def _settings() -> dict[str, Row]:
    first, second = user("How much is one and one?"), user("Now add another one.")
    thoughts = (
        first, answer("It is 2.", reasoning_content=THOUGHT), second, answer("It is 3.", reasoning_content="Two and 1.")
    )  # fmt: skip
    called = answer("", reasoning_content="I must look.", tool_calls=[call({"city": "Paris"})])
    documents = [{"title": "Sums", "text": "One and one is two."}, {"title": "More", "text": "Two and one is three."}]
    return {
        "enable_thinking false": row(first, answer("It is 2."), chat_template_kwargs={"enable_thinking": False}),
        "enable_thinking true": row(
            first, answer("It is 2.", reasoning_content=THOUGHT), chat_template_kwargs={"enable_thinking": True}
        ),
        "enable_thinking false, several turns": row(
            first, answer("It is 2."), second, answer("It is 3."), chat_template_kwargs={"enable_thinking": False}
        ),
        "enable_thinking false, call": row(
            user("How is the weather in Paris?"), {**called, "reasoning_content": None}, result("sunny, 21 degrees"),
            answer("Sunny."), tools=[WEATHER], chat_template_kwargs={"enable_thinking": False},
        ),
        "preserve_thinking": row(
            *thoughts, chat_template_kwargs={"preserve_thinking": True, "truncate_history_thinking": False}
        ),
        "reasoning_effort": row(*thoughts[:2], chat_template_kwargs={"reasoning_effort": "low"}),
        "documents": row(first, answer("It is 2."), documents=documents),
    }  # fmt: skip
