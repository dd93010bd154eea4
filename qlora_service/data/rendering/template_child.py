"""The child process that renders conversations with an untrusted chat template, within limits.

`python -m qlora_service.data.rendering.template_child`, driven by `template_process`.
"""

from __future__ import annotations

import json
import math
import resource
import sys
from datetime import datetime
from typing import Any

from qlora_service.data.rendering.chat_template import ChatTemplate, TemplateError
from qlora_service.data.rendering.conversation_text import ConversationText

ERROR_CHARS = 500


def serve(stdin: Any = sys.stdin, stdout: Any = sys.stdout) -> None:
    """Renders batches of conversations until stdin ends; every request and answer is one JSON line.

    The first line is the setup: template, special_tokens, now, memory_bytes, row_chars, cpu_s. Each further line is a
    batch: rows, a list of [messages, trained, tools, documents, template_arguments], and cpu_s; its answer is a list
    of {"text", "spans", "warnings"} or {"error"}. A line that takes more than about its cpu_s of processor time ends
    the process.
    """
    setup = json.loads(stdin.readline())
    resource.setrlimit(resource.RLIMIT_AS, (setup["memory_bytes"], setup["memory_bytes"]))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _limit_cpu(setup["cpu_s"])
    renderer: ConversationText | None = None
    try:
        template = ChatTemplate(setup["template"], setup["special_tokens"], datetime.fromisoformat(setup["now"]))
        renderer = ConversationText(template)
        answer: Any = {"ready": True}
    except TemplateError as error:
        answer = {"error": _error_text(error)}
    print(json.dumps(answer), file=stdout, flush=True)
    for line in stdin:
        batch = json.loads(line)
        _limit_cpu(batch["cpu_s"])
        answers = [_render_row(renderer, row, setup["row_chars"]) for row in batch["rows"]]
        print(json.dumps(answers), file=stdout, flush=True)


def _limit_cpu(seconds: float) -> None:
    """Makes the kernel end this process after `seconds` more of processor time, at most a second later.

    The parent kills a template that hangs; if the parent has died, only this limit does.
    """
    usage = resource.getrusage(resource.RUSAGE_SELF)
    limit_s = math.ceil(usage.ru_utime + usage.ru_stime + seconds)
    _, hard_s = resource.getrlimit(resource.RLIMIT_CPU)
    # The soft limit ends the process too, and can be raised again up to the hard limit.
    soft_s = limit_s if hard_s == resource.RLIM_INFINITY else min(limit_s, hard_s)
    resource.setrlimit(resource.RLIMIT_CPU, (soft_s, hard_s))


def _render_row(renderer: ConversationText | None, row: Any, row_chars: int) -> dict[str, Any]:
    assert renderer is not None
    try:
        located = renderer.render(*row)
        located.text.encode()
    except UnicodeEncodeError:
        return {"error": "the chat template wrote an unpaired surrogate, which is not a character"}
    except TemplateError as error:
        return {"error": _error_text(error)}
    except (MemoryError, RecursionError) as error:
        return {"error": f"the chat template exceeded a limit on this conversation ({type(error).__name__})"}
    if len(located.text) > row_chars:
        length = len(located.text)
        return {"error": f"the chat template rendered this conversation to {length} characters; at most {row_chars}"}
    return {"text": located.text, "spans": located.spans, "warnings": located.warnings}


def _error_text(error: TemplateError) -> str:
    """The error's message, any part of which the template may choose, truncated and in valid UTF-8."""
    return str(error)[:ERROR_CHARS].encode(errors="backslashreplace").decode()


if __name__ == "__main__":
    serve()
