"""A row's conversation as text: its messages in the form that the template renders, and the spans of its answers."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

from qlora_service.data.rendering.answer_spans import LocatedAnswers, MessageWarning, locate_answers
from qlora_service.data.rendering.chat_template import ChatTemplate, Conversation, Message, TemplateError
from qlora_service.data.rendering.message_forms import (
    ArgumentForm,
    required_argument_form,
    requires_parts,
    with_arguments_as,
    with_parts,
)

_OTHER_ROLES = {"developer": "system", "function": "tool"}
"""Roles of OpenAI's API that most templates do not know, and what they are called there"""


class ConversationText:
    """Renders conversations with one template."""

    def __init__(self, template: ChatTemplate) -> None:
        self._template = template

    def render(
        self,
        messages: Sequence[Message],
        trained: Sequence[bool],
        tools: list[Any] | None = None,
        documents: list[Any] | None = None,
        arguments: dict[str, Any] | None = None,
    ) -> LocatedAnswers:
        """The text of a conversation, with the character spans of its trained messages.

        A role that the template refuses or leaves out is replaced by its older name.

        Raises:
            TemplateError: the template refused the conversation, or an answer cannot be located.
        """
        if any(message.get("tool_calls") for message in messages) and self._argument_form is not None:
            messages = [with_arguments_as(self._argument_form, message) for message in messages]
        if self._requires_parts:
            messages = [with_parts(message) for message in messages]
        conversation = Conversation(tuple(messages), tools or None, documents or None, arguments)
        unusual = [index for index, message in enumerate(messages) if message["role"] in _OTHER_ROLES]
        if not unusual:
            return locate_answers(self._template, conversation, trained)
        try:
            located = locate_answers(self._template, conversation, trained)
            if not any(index in unusual for index, *_ in located.warnings):
                return located
        except TemplateError:
            located = None
        return self._with_older_roles(conversation, trained, located)

    @cached_property
    def _argument_form(self) -> ArgumentForm | None:
        return required_argument_form(self._template)

    @cached_property
    def _requires_parts(self) -> bool:
        return requires_parts(self._template)

    def _with_older_roles(
        self, conversation: Conversation, trained: Sequence[bool], located: LocatedAnswers | None
    ) -> LocatedAnswers:
        renamed = [{**m, "role": _OTHER_ROLES.get(m["role"], m["role"])} for m in conversation.messages]
        try:
            result = locate_answers(self._template, conversation.with_messages(renamed), trained)
        except TemplateError:
            if located is None:
                raise
            return located
        for index, message in enumerate(conversation.messages):
            if (role := message["role"]) in _OTHER_ROLES:
                reason = f"the chat template does not know the role {role}: rendered as {_OTHER_ROLES[role]}"
                result.warnings.append(MessageWarning(index, "/role", reason))
        return result
