"""The forms of messages that a template renders, determined from sample conversations.

Arguments of tool calls are JSON text, as OpenAI sends them, or an object; contents are text, or a list of parts.
"""

from __future__ import annotations

import json
from typing import Any, Literal

from qlora_service.data.rendering.chat_template import ChatTemplate, Conversation, Message, TemplateError

ArgumentForm = Literal["text", "object"]

_OBJECT = {"city": "Oslo"}
_TEXT = json.dumps(_OBJECT)
_TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string", "description": "A city"}}},
    },
}


def required_argument_form(template: ChatTemplate) -> ArgumentForm | None:
    """The only form that the template renders right; None where both forms, or neither, are rendered right."""
    text = _with_call(template, _TEXT)
    # The text itself: neither quoted and escaped as a JSON string, nor in further braces.
    renders_text = _TEXT in text and f"{{{_TEXT}}}" not in text
    text = _with_call(template, _OBJECT)
    # The value, not in Python's notation of a dict.
    renders_object = _OBJECT["city"] in text and str(_OBJECT) not in text
    if renders_text == renders_object:
        return None
    return "text" if renders_text else "object"


def requires_parts(template: ChatTemplate) -> bool:
    """Whether the template renders contents that are lists of parts, and leaves out or refuses text."""
    sample: list[Message] = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Sunny."}]
    if "Sunny." in _rendered(template, sample):
        return False
    return "Sunny." in _rendered(template, [with_parts(message) for message in sample])


def with_parts(message: Message) -> Message:
    """The message with its content as a list of one part."""
    content = message.get("content")
    return {**message, "content": [{"type": "text", "text": content}]} if isinstance(content, str) else message


def with_arguments_as(form: ArgumentForm, message: Message) -> Message:
    """The message with the arguments of its tool calls in the given form."""
    calls = message.get("tool_calls")
    if not isinstance(calls, list):
        return message
    return {**message, "tool_calls": [_converted(form, call) for call in calls]}


def _converted(form: ArgumentForm, call: Any) -> Any:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict):
        return call
    arguments = function.get("arguments")
    if form == "object" and isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except ValueError:
            return call
    elif form == "text" and isinstance(arguments, dict):
        arguments = json.dumps(arguments, ensure_ascii=False)
    else:
        return call
    return {**call, "function": {**function, "arguments": arguments}}


def _with_call(template: ChatTemplate, arguments: Any) -> str:
    """A sample conversation with one tool call; empty where the template refuses it with and without a result."""
    # Mistral's templates accept only ids of nine letters and digits.
    call = {"id": "weather01", "type": "function", "function": {"name": "weather", "arguments": arguments}}
    messages: list[Message] = [
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "name": "weather", "tool_call_id": "weather01", "content": "sunny"},
        {"role": "assistant", "content": "Sunny."},
    ]
    return _rendered(template, messages, [_TOOL]) or _rendered(template, messages[:2], [_TOOL])


def _rendered(template: ChatTemplate, messages: list[Message], tools: list[Any] | None = None) -> str:
    try:
        return template.text(Conversation(tuple(messages), tools))
    except TemplateError:
        return ""
