"""Conversations in the form that a template renders."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest

from qlora_service.data.rendering.answer_spans import LocatedAnswers
from qlora_service.data.rendering.chat_template import ChatTemplate, TemplateError
from qlora_service.data.rendering.conversation_text import ConversationText

ANY_ROLE = "{% for m in messages %}{{ '<' + m.role + '>' + m.content + '</>' }}{% endfor %}"
DROPS = "{% for m in messages if m.role in ['system', 'user', 'assistant', 'tool'] %}" + ANY_ROLE.partition("%}")[2]
REFUSES = ANY_ROLE.replace(
    "{{ '<'", "{% if m.role in ['developer', 'function'] %}{{ raise_exception('role') }}{% endif %}{{ '<'"
)


def rendered(template: str, *roles: str, **keys: Any) -> LocatedAnswers:
    messages = [{"role": role, "content": f"{role} {place}", **keys} for place, role in enumerate(roles)]
    renderer = ConversationText(ChatTemplate(template, {}, datetime(2026, 3, 1, tzinfo=UTC)))
    return renderer.render(messages, [role == "assistant" for role in roles])


def test_a_role_that_the_template_knows_is_kept() -> None:
    result = rendered(ANY_ROLE, "developer", "user", "assistant")
    assert result.text.startswith("<developer>developer 0</>")
    assert result.warnings == []


@pytest.mark.parametrize("template", [DROPS, REFUSES])
@pytest.mark.parametrize(("role", "older"), [("developer", "system"), ("function", "tool")])
def test_a_role_that_the_template_drops_or_refuses_has_its_older_name(template: str, role: str, older: str) -> None:
    result = rendered(template, role, "user", "assistant")
    assert result.text.startswith(f"<{older}>{role} 0</>")
    ((message, pointer, reason),) = result.warnings
    assert (message, pointer) == (0, "/role")
    assert reason == f"the chat template does not know the role {role}: rendered as {older}"


def test_the_refusal_of_both_names_is_the_templates() -> None:
    with pytest.raises(TemplateError, match="no roles"):
        rendered("{{ raise_exception('no roles') }}", "developer", "user", "assistant")


def test_contents_become_parts_where_the_template_reads_parts() -> None:
    template = "{% for m in messages %}{% for p in m.content %}[{{ p.text }}]{% endfor %}{% endfor %}"
    result = rendered(template, "user", "assistant")
    assert result.text == "[user 0][assistant 1]"
    assert result.warnings == []
